// What the convolution and its gradients share: images with a border, and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace nadaptor {

namespace ffi = xla::ffi;
using Room = std::vector<float>;

// Images and how they are copied, with a border of zeros; a negative one crops.
struct Image {
  int64_t height, width, channels, top, left, high, wide;  // the last two with the border
  int64_t size() const { return height * width * channels; }
  int64_t padded() const { return high * wide * channels; }
  bool bordered() const { return top || left || high != height || wide != width; }
};

inline void pad(const Image& s, const float* x, float* to) {
  const int64_t first = std::max<int64_t>(0, -s.left);
  const int64_t kept = std::min(s.width, s.wide - s.left) - first;
  for (int64_t y = 0; y < s.high; y++, to += s.wide * s.channels) {
    const int64_t from = y - s.top;
    std::memset(to, 0, sizeof(float) * s.wide * s.channels);
    if (from >= 0 && from < s.height && kept > 0)
      std::memcpy(to + (s.left + first) * s.channels, x + (from * s.width + first) * s.channels,
                  sizeof(float) * kept * s.channels);
  }
}

// Copies `number` images, or gives them as they are.
inline const float* pad_all(const Image& s, const float* x, int64_t number, Room& room) {
  if (!s.bordered()) return x;
  if ((int64_t)room.size() < number * s.padded()) room.resize(number * s.padded());
  for (int64_t n = 0; n < number; n++) pad(s, x + n * s.size(), room.data() + n * s.padded());
  return room.data();
}

// Runs `work(0..tasks-1)`, on several threads where `pool` has them. The caller takes tasks, too, and
// waits for those alone that others have begun: a busy pool delays nothing.
template <typename Work>
void spread(ffi::ThreadPool& pool, bool alone, int64_t tasks, const Work& work) {
  const int64_t threads = alone ? 1 : std::min(pool.num_threads(), tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) work(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable changed;
    int64_t done = 0;
  };
  const auto state = std::make_shared<State>();
  auto take = [state, tasks, &work] {
    // `work` lives until all tasks are done, and is not touched before one is taken.
    for (int64_t i; (i = state->next++) < tasks;) {
      work(i);
      std::lock_guard<std::mutex> lock(state->mutex);
      if (++state->done == tasks) state->changed.notify_all();
    }
  };
  for (int64_t i = 1; i < threads; i++) pool.Schedule(decltype(take)(take));
  take();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->changed.wait(lock, [&] { return state->done == tasks; });
}

}  // namespace nadaptor
