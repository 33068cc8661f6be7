// A convolution that adds, for each value that is not zero, the weights that this value meets.
//
// Each image of the call goes one of two ways. Where few of its values are spikes, their channels
// are listed pixel by pixel, and every sum takes the listed rows of weights alone. Otherwise all
// channels are taken, several pixels at a time. Both add to a sum in one order: by column of the
// kernel, by row, by channel. A zero adds nothing, so that the choice changes no bit of the result,
// nor does the batch.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A vector of the compiler's own: on a machine of narrower ones it is several, on one of wider ones
// a part. Twelve of them stay in registers as sums.
constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint16_t Channels __attribute__((vector_size(2 * kLanes), aligned(2)));

// Images [height, width, channels], kernels [rows, padded, channels, block] for a block of outputs.
struct Shape {
  int64_t height, width, channels, out_height, out_width, outputs;
  int64_t rows, columns, down, right, top, left;  // of the kernel, its strides, the padding
  int64_t taps;  // the columns of a kernel that a pixel can meet: columns / right, rounded up
  int64_t wide;  // columns of an image with its border
  int64_t padded() const { return taps * right; }
  int64_t size() const { return height * width * channels; }
};

// The channels of the spikes of one image, and how many each pixel has.
struct Events {
  std::vector<uint16_t> channels, counts;
};

// The positions of the bits that are set in each byte, in order.
struct Positions {
  Channels of[1 << kLanes];
  Positions() {
    for (int byte = 0; byte < 1 << kLanes; byte++) {
      of[byte] = Channels{};
      for (int bit = 0, n = 0; bit < kLanes; bit++)
        if (byte >> bit & 1) of[byte][n++] = bit;
    }
  }
};
const Positions kPositions;

inline int spikes_at(const float* x) {
#ifdef __AVX__
  typedef float Aligned __attribute__((vector_size(4 * kLanes)));
  return __builtin_ia32_movmskps256((Aligned)(*(const Floats*)x != 0.0f));
#else
  int byte = 0;
  for (int bit = 0; bit < kLanes; bit++) byte |= (x[bit] != 0.0f) << bit;
  return byte;
#endif
}

int64_t count(const float* x, int64_t size) {
  int64_t total = 0;
  for (int64_t first = 0; first < size; first += 1 << 15) {
    int32_t some = 0;  // of four bytes, as a float, so that a vector compares and adds
    for (int64_t i = first, end = std::min<int64_t>(size, first + (1 << 15)); i < end; i++)
      some += x[i] != 0.0f;
    total += some;
  }
  return total;
}

void list(const Shape& s, const float* x, Events& events) {
  events.channels.resize(s.size() + kLanes);  // what is written past the last is not read
  events.counts.resize(s.height * s.width);
  uint16_t* to = events.channels.data();
  for (auto& counted : events.counts) {
    int n = 0, c = 0;
    for (; c + kLanes <= s.channels; c += kLanes) {
      const int byte = spikes_at(x + c);
      *(Channels*)(to + n) = kPositions.of[byte] + (uint16_t)c;
      n += __builtin_popcount(byte);
    }
    for (; c < s.channels; c++) {
      to[n] = c;
      n += x[c] != 0.0f;
    }
    counted = n;
    x += s.channels;
    to += s.channels;
  }
}

template <int V>
inline void store(const Floats (&sum)[V], float* out, int64_t number) {
  if (number == V * kLanes)
    std::memcpy(out, sum, sizeof sum);
  else
    std::memcpy(out, sum, sizeof(float) * number);
}

// Adds one pixel's spikes to the sums of N outputs side by side, of which the last is the newest.
template <int V, int T, int N>
inline void add(Floats (&sums)[T][V], const float* x, const uint16_t* channels, int number,
                const float* w, int64_t across) {
  for (int i = 0; i < number; i++) {
    const int64_t c = channels[i];
    const float z = x[c];
    const float* row = w + c * V * kLanes;
    for (int j = 0; j < N; j++)
      for (int v = 0; v < V; v++)
        sums[T - 1 - j][v] += z * *(const Floats*)(row + j * across + v * kLanes);
  }
}

// One image, one block of outputs. Along a row, the sums of the T outputs that the next pixel can
// still reach are kept in registers; one is done when the last pixel under its kernel has gone by.
template <int V, int T>
void by_events(const Shape& s, const float* x, const Events& events, const float* w, float* out,
               int64_t number) {
  const int64_t tap = s.channels * V * kLanes;
  for (int64_t y = 0; y < s.out_height; y++) {
    const int64_t above = y * s.down - s.top;
    const int64_t first = std::max<int64_t>(0, -above);
    const int64_t last = std::min(s.rows, s.height - above);
    Floats sums[T][V] = {};
    for (int64_t q = 1 - T; q < s.out_width; q++) {
      for (int64_t r = 0; r < s.right && r < s.columns; r++) {
        const int64_t column = (q + T - 1) * s.right + r - s.left;
        if (column < 0 || column >= s.width) continue;
        const bool all = r + (T - 1) * s.right < s.columns;
        for (int64_t i = first; i < last; i++) {
          const int64_t pixel = (above + i) * s.width + column;
          const float* from = x + pixel * s.channels;
          const uint16_t* channels = events.channels.data() + pixel * s.channels;
          const float* row = w + (i * s.padded() + r) * tap;
          if (all)
            add<V, T, T>(sums, from, channels, events.counts[pixel], row, s.right * tap);
          else
            add<V, T, T - 1>(sums, from, channels, events.counts[pixel], row, s.right * tap);
        }
      }
      if (q >= 0) store(sums[0], out + (y * s.out_width + q) * s.outputs, number);
      for (int j = 0; j + 1 < T; j++)
        for (int v = 0; v < V; v++) sums[j][v] = sums[j + 1][v];
      for (int v = 0; v < V; v++) sums[T - 1][v] = Floats{};
    }
  }
}

// P outputs side by side from all channels; `x` has the border of zeros to the left and right.
template <int V, int P>
inline void densely_at(const Shape& s, const float* x, const float* w, int64_t y, int64_t q,
                       float* out, int64_t number) {
  const int64_t step = s.right * s.channels, above = y * s.down - s.top;
  const int64_t first = std::max<int64_t>(0, -above), last = std::min(s.rows, s.height - above);
  Floats sums[P][V] = {};
  for (int64_t j = 0; j < s.columns; j++)
    for (int64_t i = first; i < last; i++) {
      const float* from = x + ((above + i) * s.wide + q * s.right + j) * s.channels;
      const float* row = w + (i * s.padded() + j) * s.channels * V * kLanes;
      for (int64_t c = 0; c < s.channels; c++, row += V * kLanes)
        for (int p = 0; p < P; p++)
          for (int v = 0; v < V; v++)
            sums[p][v] += from[p * step + c] * *(const Floats*)(row + v * kLanes);
    }
  for (int p = 0; p < P; p++) store(sums[p], out + (q + p) * s.outputs, number);
}

template <int V, int P>
void densely(const Shape& s, const float* x, const float* w, float* out, int64_t number) {
  for (int64_t y = 0; y < s.out_height; y++, out += s.out_width * s.outputs) {
    int64_t q = 0;
    // One pixel alone keeps too few sums to hide how long an addition takes.
    for (; s.out_width - q >= P && s.out_width - q != P + 1; q += P)
      densely_at<V, P>(s, x, w, y, q, out, number);
    for (; s.out_width - q >= 2; q += 2) densely_at<V, 2>(s, x, w, y, q, out, number);
    for (; q < s.out_width; q++) densely_at<V, 1>(s, x, w, y, q, out, number);
  }
}

void pad(const Shape& s, const float* x, float* to) {
  for (int64_t y = 0; y < s.height; y++, x += s.width * s.channels, to += s.wide * s.channels) {
    std::memset(to, 0, sizeof(float) * s.wide * s.channels);
    const int64_t kept = std::min(s.width, s.wide - s.left);
    std::memcpy(to + s.left * s.channels, x, sizeof(float) * kept * s.channels);
  }
}

using ByEvents = void (*)(const Shape&, const float*, const Events&, const float*, float*, int64_t);
using Densely = void (*)(const Shape&, const float*, const float*, float*, int64_t);

template <int V>
ByEvents choose(int64_t taps) {
  return taps == 1 ? by_events<V, 1> : taps == 2 ? by_events<V, 2> : by_events<V, 3>;
}

ffi::Error Convolve(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w, ffi::Buffer<ffi::F32> most,
                    ffi::ResultBuffer<ffi::F32> out, int64_t columns, int64_t down, int64_t right,
                    int64_t top, int64_t left) {
  const auto in = x.dimensions(), to = out->dimensions(), kernel = w.dimensions();
  const Shape s{in[1], in[2], in[3], to[1], to[2], to[3], kernel[1], columns, down, right, top, left,
                kernel[2] / right, std::max(in[2] + left, (to[2] - 1) * right + columns)};
  const int64_t block = kernel[4], number = in[0];
  if (s.taps < 1 || s.taps > 3 || (block != 2 * kLanes && block != 4 * kLanes))
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "no such kernel");
  const ByEvents run_by_events = block == 2 * kLanes ? choose<2>(s.taps) : choose<4>(s.taps);
  const Densely run_densely = block == 2 * kLanes ? densely<2, 6> : densely<4, 3>;

  // Kept from call to call, as fresh memory costs more than what is done with it.
  static thread_local std::vector<Events> events;
  static thread_local std::vector<float> padded;
  static thread_local std::vector<char> sparse;
  const int64_t spread = s.height * s.wide * s.channels;
  const bool bordered = s.wide != s.width;
  if ((int64_t)events.size() < number) events.resize(number);
  sparse.resize(number);
  for (int64_t n = 0; n < number; n++) {
    const float* image = x.typed_data() + n * s.size();
    sparse[n] = count(image, s.size()) <= *most.typed_data() * s.size();
    if (sparse[n]) {
      list(s, image, events[n]);
    } else if (bordered) {
      if ((int64_t)padded.size() < number * spread) padded.resize(number * spread);
      pad(s, image, padded.data() + n * spread);
    }
  }
  // A block's weights stay in the cache for all images.
  for (int64_t first = 0; first < s.outputs; first += block)
    for (int64_t n = 0; n < number; n++) {
      const float* image = x.typed_data() + n * s.size();
      const float* weights = w.typed_data() + first * s.rows * s.padded() * s.channels;
      float* result = out->typed_data() + n * s.out_height * s.out_width * s.outputs + first;
      const int64_t wanted = std::min(block, s.outputs - first);
      if (sparse[n])
        run_by_events(s, image, events[n], weights, result, wanted);
      else
        run_densely(s, bordered ? padded.data() + n * spread : image, weights, result, wanted);
    }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NadaptorEvents, Convolve,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("columns")
                                  .Attr<int64_t>("down")
                                  .Attr<int64_t>("right")
                                  .Attr<int64_t>("top")
                                  .Attr<int64_t>("left"));
