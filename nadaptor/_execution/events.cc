// A convolution that adds, for each value that is not zero, the weights that this value meets.
//
// Each image of the call goes one of two ways. Where few of its values are spikes, their channels
// are listed pixel by pixel, and every sum takes the listed rows of weights alone. Otherwise all
// channels are taken, several pixels at a time. Both add to a sum in one order, so that the choice
// changes no bit of the result, as a zero adds nothing, nor does the batch.

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
constexpr int kCache = 16;  // floats in a line of the cache
// Aligned, so that the 16 sums of a pixel in the narrow block are one line.
struct alignas(4 * kCache) Cache {
  float of[kCache];
};
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t Entries __attribute__((vector_size(4 * kLanes), aligned(4)));

// Images [height, width, channels], kernels [rows, padded, channels, block] for a block of outputs.
struct Shape {
  int64_t height, width, channels, out_height, out_width, outputs;
  int64_t rows, columns, down, right, top, left;  // of the kernel, its strides, the padding
  int64_t taps;  // the columns of a kernel that a pixel can meet: columns / right, rounded up
  int64_t wide;  // columns of an image with its border
  int64_t padded() const { return taps * right; }
  int64_t size() const { return height * width * channels; }
};

// The spikes of one image in order, each its column and its channel, and where each pixel's begin.
struct Events {
  std::vector<uint32_t> entries;
  std::vector<int32_t> starts;
};
inline int64_t column_of(uint32_t entry) { return entry >> 16; }
inline int64_t channel_of(uint32_t entry) { return entry & 0xffff; }

// The positions of the bits that are set in each byte, in order.
struct Positions {
  Entries of[1 << kLanes];
  Positions() {
    for (int byte = 0; byte < 1 << kLanes; byte++) {
      of[byte] = Entries{};
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
  events.entries.resize(s.size() + kLanes);  // what is written past the last is not read
  events.starts.resize(s.height * s.width + 1);
  uint32_t* const entries = events.entries.data();
  int32_t n = 0, pixel = 0;
  for (int64_t y = 0; y < s.height; y++)
    for (uint32_t column = 0; column < s.width; column++, x += s.channels) {
      events.starts[pixel++] = n;
      uint32_t c = 0;
      for (; c + kLanes <= s.channels; c += kLanes) {
        // All eight are written, and only the spikes among them counted: no branch to foresee.
        const int byte = spikes_at(x + c);
        *(Entries*)(entries + n) = kPositions.of[byte] + (column << 16 | c);
        n += __builtin_popcount(byte);
      }
      for (; c < s.channels; c++) {
        entries[n] = column << 16 | c;
        n += x[c] != 0.0f;
      }
    }
  events.starts[pixel] = n;
}

template <int V>
inline void store(const Floats (&sum)[V], float* out, int64_t number) {
  // The size of a whole block is known to the compiler.
  if (number == V * kLanes)
    std::memcpy(out, sum, sizeof sum);
  else
    std::memcpy(out, sum, sizeof(float) * number);
}

// Adds one pixel's spikes to the sums of N outputs side by side, of which the last is the newest.
template <int V, int T, int N>
inline void add(Floats (&sums)[T][V], const float* x, const uint32_t* entry, const uint32_t* end,
                const float* w, int64_t across) {
  for (; entry < end; entry++) {
    const int64_t c = channel_of(*entry);
    const float z = x[c];
    const float* row = w + c * V * kLanes;
    for (int j = 0; j < N; j++)
      for (int v = 0; v < V; v++)
        sums[T - 1 - j][v] += z * *(const Floats*)(row + j * across + v * kLanes);
  }
}

// One image, one block of outputs: to a sum, by column of the kernel, by row, by channel. Along a
// row, the sums of the T outputs that the next pixel can still reach are kept in registers; one is
// done when the last pixel under its kernel has gone by.
template <int V, int T>
void gather(const Shape& s, const float* x, const Events& events, const float* w, float* out,
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
        // Where the stride does not divide the columns, the oldest output may have none here.
        const bool all = r + (T - 1) * s.right < s.columns;
        for (int64_t i = first; i < last; i++) {
          const int64_t pixel = (above + i) * s.width + column;
          const float* from = x + pixel * s.channels;
          const uint32_t* entry = events.entries.data() + events.starts[pixel];
          const uint32_t* end = events.entries.data() + events.starts[pixel + 1];
          const float* row = w + (i * s.padded() + r) * tap;
          if (all)
            add<V, T, T>(sums, from, entry, end, row, s.right * tap);
          else
            add<V, T, T - 1>(sums, from, entry, end, row, s.right * tap);
        }
      }
      if (q >= 0) store(sums[0], out + (y * s.out_width + q) * s.outputs, number);
      for (int j = 0; j + 1 < T; j++)
        for (int v = 0; v < V; v++) sums[j][v] = sums[j + 1][v];
      for (int v = 0; v < V; v++) sums[T - 1][v] = Floats{};
    }
  }
}

// The same at stride 1 across, by row of the kernel, by column, by channel: each spike of a row is
// added to all sums that it reaches, in memory. With few channels a pixel has a spike or two, and
// a loop over them would end in an unforeseen branch at nearly every pixel.
template <int V, int T>
void scatter(const Shape& s, const float* x, const Events& events, const float* w, float* out,
             int64_t number) {
  constexpr int64_t n = V * kLanes;
  static thread_local std::vector<Cache> room;
  // So wide that what falls beside the output is added there, and not read.
  const int64_t tap = s.channels * n, line = std::max(s.out_width + T - 1, s.wide + T - 1) * n;
  room.assign((s.out_height * line + kCache - 1) / kCache, Cache{});
  float* const sums = room[0].of;
  for (int64_t y = 0; y < s.height; y++) {
    const int64_t reach = y + s.top;  // the row of the kernel that is here: reach - down * output
    const int64_t first = reach < s.rows ? 0 : (reach - s.rows) / s.down + 1;
    const int64_t above = std::min(s.out_height - 1, reach / s.down) - first + 1;
    const float* row = x + y * s.width * s.channels;
    const float* kernel = w + (reach - first * s.down) * T * tap;
    float* const base = sums + first * line + s.left * n;
    const uint32_t* entry = events.entries.data() + events.starts[y * s.width];
    const uint32_t* const end = events.entries.data() + events.starts[(y + 1) * s.width];
    const auto add = [&](int64_t rows) __attribute__((always_inline)) {
      for (; entry < end; entry++) {
        const int64_t column = column_of(*entry), c = channel_of(*entry);
        const float z = row[column * s.channels + c];
        for (int64_t i = 0; i < rows; i++)
          for (int j = 0; j < T; j++)
            for (int v = 0; v < V; v++) {
              Floats* sum = (Floats*)(base + i * line + (column + j) * n + v * kLanes);
              const float* from = kernel + c * n + v * kLanes;
              *sum += z * *(const Floats*)(from + ((T - 1 - j) - i * s.down * T) * tap);
            }
      }
    };
    // Nearly all rows of a 3x3 kernel at stride 1: with the number known, the loop is unrolled.
    above == 3 ? add(3) : add(above);
  }
  for (int64_t y = 0; y < s.out_height; y++)
    for (int64_t q = 0; q < s.out_width; q++) {
      const Floats(&sum)[V] = *(const Floats(*)[V])(sums + y * line + (q + T - 1) * n);
      store(sum, out + (y * s.out_width + q) * s.outputs, number);
    }
}

// P outputs side by side from all channels; `x` has the border of zeros to the left and right.
template <int V, int P, bool ByRow>
inline void densely_at(const Shape& s, const float* x, const float* w, int64_t y, int64_t q,
                       float* out, int64_t number) {
  const int64_t step = s.right * s.channels, above = y * s.down - s.top;
  const int64_t first = std::max<int64_t>(0, -above), last = std::min(s.rows, s.height - above);
  Floats sums[P][V] = {};
  const int64_t height = std::max<int64_t>(0, last - first), taps = height * s.columns;
  for (int64_t tap = 0; tap < taps; tap++) {
      const int64_t i = first + (ByRow ? tap / s.columns : tap % height);
      const int64_t j = ByRow ? tap % s.columns : tap / height;
      const float* from = x + ((above + i) * s.wide + q * s.right + j) * s.channels;
      const float* row = w + (i * s.padded() + j) * s.channels * V * kLanes;
      for (int64_t c = 0; c < s.channels; c++, row += V * kLanes)
        for (int p = 0; p < P; p++)
          for (int v = 0; v < V; v++)
            sums[p][v] += from[p * step + c] * *(const Floats*)(row + v * kLanes);
    }
  for (int p = 0; p < P; p++) store(sums[p], out + (q + p) * s.outputs, number);
}

template <int V, int P, bool ByRow>
void densely(const Shape& s, const float* x, const float* w, float* out, int64_t number) {
  for (int64_t y = 0; y < s.out_height; y++, out += s.out_width * s.outputs) {
    int64_t q = 0;
    // One pixel alone keeps too few sums to hide how long an addition takes.
    for (; s.out_width - q >= P && s.out_width - q != P + 1; q += P)
      densely_at<V, P, ByRow>(s, x, w, y, q, out, number);
    for (; s.out_width - q >= 2; q += 2) densely_at<V, 2, ByRow>(s, x, w, y, q, out, number);
    for (; q < s.out_width; q++) densely_at<V, 1, ByRow>(s, x, w, y, q, out, number);
  }
}

void pad(const Shape& s, const float* x, float* to) {
  for (int64_t y = 0; y < s.height; y++, x += s.width * s.channels, to += s.wide * s.channels) {
    std::memset(to, 0, sizeof(float) * s.wide * s.channels);
    const int64_t kept = std::min(s.width, s.wide - s.left);
    std::memcpy(to + s.left * s.channels, x, sizeof(float) * kept * s.channels);
  }
}

// The narrow block is scattered where it can be, and the dense sums follow its order.
using ByEvents = void (*)(const Shape&, const float*, const Events&, const float*, float*, int64_t);
using Densely = void (*)(const Shape&, const float*, const float*, float*, int64_t);

template <int V>
ByEvents choose_gather(int64_t taps) {
  return taps == 1 ? gather<V, 1> : taps == 2 ? gather<V, 2> : gather<V, 3>;
}

ffi::Error Convolve(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w, ffi::Buffer<ffi::F32> most,
                    ffi::ResultBuffer<ffi::F32> out, int64_t columns, int64_t down, int64_t right,
                    int64_t top, int64_t left) {
  const auto in = x.dimensions(), to = out->dimensions(), kernel = w.dimensions();
  // A border so wide that the last output and the last pixel both find their columns in it.
  const Shape s{in[1], in[2], in[3], to[1], to[2], to[3], kernel[1], columns, down, right, top, left,
                kernel[2] / right, std::max(in[2] + left, (to[2] - 1) * right + columns)};
  const int64_t block = kernel[4], number = in[0];
  if (s.taps < 1 || s.taps > 3 || (right == 1 && s.taps == 2) || (block != 2 * kLanes && block != 4 * kLanes))
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "no such kernel");
  const bool narrow = block == 2 * kLanes, scattered = narrow && right == 1;
  const ByEvents by_events = scattered ? (s.taps == 1 ? scatter<2, 1> : scatter<2, 3>)
                             : narrow  ? choose_gather<2>(s.taps)
                                       : choose_gather<4>(s.taps);
  const Densely densely_ = scattered ? densely<2, 6, true>
                           : narrow  ? densely<2, 6, false>
                                     : densely<4, 3, false>;

  if (out->element_count() == 0) return ffi::Error::Success();
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
    // Below 0 no image is sparse: a weight that is not finite makes NaN of a zero.
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
        by_events(s, image, events[n], weights, result, wanted);
      else
        densely_(s, bordered ? padded.data() + n * spread : image, weights, result, wanted);
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
