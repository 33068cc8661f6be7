// A convolution and its two gradients, in float32, of images [N, H, W, C] and kernels [I, J, C, K].
//
// All three are products whose sums stay in registers: some pixels by sixteen outputs, or as many
// weights by sixteen outputs. Images are copied with their border a few at a time, so that a pixel's
// patch is I runs of J * C floats and no sum asks where an image ends. Each sum has one order,
// whatever the batch and the threads.

#include "convolve.h"

#include <type_traits>

namespace {

using namespace nadaptor;

// Outputs of a block, floats of a vector, and rows of registers: twelve sums, or eight of twice the
// width, as many as are under way at once. A vector is the compiler's own: on a machine of narrower
// ones it is several. No sum's order depends on them.
#ifdef __AVX512F__
constexpr int64_t kBlock = 16, kLanes = 16, kRows = 8;
#else
constexpr int64_t kBlock = 16, kLanes = 8, kRows = 6;
#endif
constexpr int kVectors = kBlock / kLanes;
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
// Pixels whose patches stay in the second-level cache while all blocks of weights go by.
constexpr int64_t kLeastPixels = 128, kMostPixels = 1024;
// Pixels that a weight's gradient adds up before it goes back to memory.
constexpr int64_t kChunk = 128;

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// Where each output of an image finds its patch, and where it lies itself, both in floats.
struct Places {
  std::vector<int64_t> from, to;
};

// One block of outputs at kRows pixels: `rows` runs of `run` floats each.
inline void sum_at(const float* x, const int64_t* from, float* out, const int64_t* to,
                   const float* w, int64_t rows, int64_t run, int64_t below) {
  Floats sums[kRows][kVectors] = {};
  const float* at[kRows];
  for (int p = 0; p < kRows; p++) at[p] = x + from[p];
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t r = 0; r < run; r++, w += kBlock)
      for (int p = 0; p < kRows; p++)
        for (int v = 0; v < kVectors; v++)
          sums[p][v] += at[p][r] * *(const Floats*)(w + v * kLanes);
    for (int p = 0; p < kRows; p++) at[p] += below;
  }
  for (int p = 0; p < kRows; p++)
    for (int v = 0; v < kVectors; v++) *(Floats*)(out + to[p] + v * kLanes) = sums[p][v];
}

void sum_all(const float* x, const int64_t* from, float* out, const int64_t* to, int64_t pixels,
             const float* w, int64_t rows, int64_t run, int64_t below) {
  int64_t q = 0;
  for (; q + kRows <= pixels; q += kRows) sum_at(x, from + q, out, to + q, w, rows, run, below);
  if (q == pixels) return;
  // What is left is filled up with the last pixel: another program for fewer would round otherwise,
  // and an image's sums depend on its place in the batch.
  int64_t last_from[kRows], last_to[kRows];
  for (int64_t p = 0; p < kRows; p++) {
    last_from[p] = from[std::min(q + p, pixels - 1)];
    last_to[p] = to[std::min(q + p, pixels - 1)];
  }
  sum_at(x, last_from, out, last_to, w, rows, run, below);
}

// A convolution at stride 1 in the padded image: the pixels of `places`, all blocks of `w`.
struct Sums {
  Places places;
  Room weights;                     // [blocks, rows, run, kBlock]
  int64_t rows, run, outputs, size; // size: floats of one image of the result
};

// How many images to copy at a time.
int64_t group_of(const Places& places, int64_t number) {
  const int64_t pixels = std::max<int64_t>(1, places.from.size());
  return std::max<int64_t>(1, std::min(number, kLeastPixels / pixels));
}

// Of a strided gradient there are several parts, which have one border and share the copies.
void convolve(const Image& image, const std::vector<Sums>& parts, const float* x, float* out,
              int64_t number, ffi::ThreadPool& pool, bool alone) {
  const int64_t group = group_of(parts[0].places, number), groups = (number + group - 1) / group;
  // Where there are fewer groups than threads, each takes a part of an image, and copies all of it.
  const int64_t threads = alone ? 1 : std::max<int64_t>(1, pool.num_threads());
  const int64_t bands = groups >= threads ? 1 : (threads + groups - 1) / groups;
  spread(pool, alone, groups * bands, [&](int64_t task) {
    static thread_local Room room;
    static thread_local Places all;
    const int64_t first = task / bands * group, count = std::min(group, number - first);
    const float* padded = pad_all(image, x + first * image.size(), count, room);
    for (const Sums& s : parts) {
      float* result = out + first * s.size;
      all.from.clear(), all.to.clear();
      for (int64_t n = 0; n < count; n++)
        for (size_t q = 0; q < s.places.from.size(); q++) {
          all.from.push_back(s.places.from[q] + n * image.padded());
          all.to.push_back(s.places.to[q] + n * s.size);
        }
      const int64_t pixels = all.from.size(), block = s.rows * s.run * kBlock;
      const int64_t end = pixels * (task % bands + 1) / bands;
      for (int64_t q = pixels * (task % bands) / bands; q < end; q += kMostPixels)
        for (int64_t k = 0; k < s.outputs; k += kBlock)
          sum_all(padded, &all.from[q], result + k, &all.to[q], std::min(kMostPixels, end - q),
                  s.weights.data() + k / kBlock * block, s.rows, s.run, image.wide * image.channels);
    }
  });
}

// What all three take beside the operands.
struct Conv {
  int64_t height, width, channels, out_height, out_width, outputs, rows, columns;
  int64_t down, right, top, left;
  // The image with the border that its outputs reach into.
  Image padded() const {
    return {height, width, channels, top, left, std::max<int64_t>(1, (out_height - 1) * down + rows),
            std::max<int64_t>(1, (out_width - 1) * right + columns)};
  }
  Places patches() const {
    const Image s = padded();
    Places places;
    for (int64_t y = 0; y < out_height; y++)
      for (int64_t q = 0; q < out_width; q++) {
        places.from.push_back((y * down * s.wide + q * right) * channels);
        places.to.push_back((y * out_width + q) * outputs);
      }
    return places;
  }
};

using Sizes = ffi::Span<const int64_t>;

Conv read(Sizes x, Sizes w, Sizes y, int64_t down, int64_t right, int64_t top, int64_t left) {
  return {x[1], x[2], x[3], y[1], y[2], y[3], w[0], w[1], down, right, top, left};
}

// Python asks for nothing else.
ffi::Error refused() { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "no such kernel"); }

ffi::Error Convolve(ffi::ThreadPool pool, Buffer x, Buffer w, Result y, int64_t down, int64_t right,
                    int64_t top, int64_t left, bool alone) {
  const Conv c = read(x.dimensions(), w.dimensions(), y->dimensions(), down, right, top, left);
  if (c.outputs % kBlock) return refused();
  if (y->element_count() == 0) return ffi::Error::Success();
  const int64_t run = c.columns * c.channels, length = c.rows * run;
  std::vector<Sums> parts{{c.patches(), Room(w.element_count()), c.rows, run, c.outputs,
                           c.out_height * c.out_width * c.outputs}};
  float* to = parts[0].weights.data();
  for (int64_t k = 0; k < c.outputs; k += kBlock)
    for (int64_t r = 0; r < length; r++, to += kBlock)
      std::memcpy(to, w.typed_data() + r * c.outputs + k, sizeof(float) * kBlock);
  convolve(c.padded(), parts, x.typed_data(), y->typed_data(), x.dimensions()[0], pool, alone);
  return ffi::Error::Success();
}

// Along one axis, the weights that reach the pixels at `phase` of a stride, and from which output.
struct Phase {
  int64_t first, taps, start;  // weights first, first + stride, ...; the first pixel's last output
};

Phase phase_of(int64_t phase, int64_t before, int64_t stride, int64_t kernel) {
  // Pixel h meets weight i of output (h + before - i) / stride, where that is whole.
  const int64_t first = (phase + before) % stride;
  return {first, first < kernel ? (kernel - first - 1) / stride + 1 : 0,
          (phase + before - first) / stride};
}

// How many outputs before the first one an image of zeros must have, for the first pixels' weights.
int64_t outputs_before(int64_t before, int64_t stride, int64_t kernel) {
  int64_t most = 0;
  for (int64_t phase = 0; phase < stride; phase++) {
    const Phase p = phase_of(phase, before, stride, kernel);
    most = std::max(most, p.taps - 1 - p.start);
  }
  return most;
}

// The gradient in the image: at each phase of the strides a convolution of `g` at stride 1, with the
// weights that meet that phase in reverse.
ffi::Error ImageGradient(ffi::ThreadPool pool, Buffer g, Buffer w, Result x, int64_t down,
                         int64_t right, int64_t top, int64_t left, bool alone) {
  const Conv c = read(x->dimensions(), w.dimensions(), g.dimensions(), down, right, top, left);
  if (c.channels % kBlock || top < 0 || left < 0) return refused();
  if (x->element_count() == 0) return ffi::Error::Success();
  const int64_t above = outputs_before(top, down, c.rows);
  const int64_t before = outputs_before(left, right, c.columns);
  const Image image{c.out_height, c.out_width, c.outputs, above, before,
                    above + std::max(c.out_height, (c.height - 1 + top) / down + 1),
                    before + std::max(c.out_width, (c.width - 1 + left) / right + 1)};
  std::vector<Sums> parts;
  for (int64_t a = 0; a < std::min(down, c.height); a++)
    for (int64_t b = 0; b < std::min(right, c.width); b++) {
      const Phase y = phase_of(a, top, down, c.rows), q = phase_of(b, left, right, c.columns);
      Sums s{{}, Room(y.taps * q.taps * c.outputs * c.channels), y.taps, q.taps * c.outputs,
             c.channels, c.height * c.width * c.channels};
      for (int64_t h = a; h < c.height; h += down)
        for (int64_t v = b; v < c.width; v += right) {
          const int64_t row = above + y.start + (h - a) / down - (y.taps - 1);
          const int64_t column = before + q.start + (v - b) / right - (q.taps - 1);
          s.places.from.push_back((row * image.wide + column) * c.outputs);
          s.places.to.push_back((h * c.width + v) * c.channels);
        }
      float* to = s.weights.data();
      for (int64_t k = 0; k < c.channels; k += kBlock)
        for (int64_t i = y.taps - 1; i >= 0; i--)
          for (int64_t j = q.taps - 1; j >= 0; j--) {
            const int64_t tap = (y.first + i * down) * c.columns + q.first + j * right;
            const float* from = w.typed_data() + (tap * c.channels + k) * c.outputs;
            for (int64_t o = 0; o < c.outputs; o++, to += kBlock)
              for (int64_t n = 0; n < kBlock; n++) to[n] = from[n * c.outputs + o];
          }
      parts.push_back(std::move(s));
    }
  convolve(image, parts, g.typed_data(), x->typed_data(), g.dimensions()[0], pool, alone);
  return ffi::Error::Success();
}

// Adds to R rows of one block of weights: x [pixels][R] side by side, or at `from`; g [pixels][16].
template <int R, bool Packed>
inline __attribute__((always_inline)) void add_at(const float* x, const int64_t* from, const float* g,
                                                  int64_t pixels, float* dw, int64_t outputs) {
  Floats sums[R][kVectors];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kVectors; v++) sums[r][v] = *(const Floats*)(dw + r * outputs + v * kLanes);
  for (int64_t p = 0; p < pixels; p++, g += kBlock) {
    const float* values = Packed ? x + p * R : x + from[p];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVectors; v++)
        sums[r][v] += values[r] * *(const Floats*)(g + v * kLanes);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kVectors; v++) *(Floats*)(dw + r * outputs + v * kLanes) = sums[r][v];
}

// Calls with a number that the compiler knows, from 1 to N.
template <int N = kRows, typename Call>
inline void of_size(int64_t size, const Call& call) {
  if (size == N) return call(std::integral_constant<int, N>());
  if constexpr (N > 1) of_size<N - 1>(size, call);
}

// R neighbouring weights of one row of the kernel, all blocks of outputs.
template <int R>
void add_all(const float* x, const int64_t* from, const float* g, int64_t pixels, float* dw,
             int64_t outputs) {
  // Used once, values are taken from where they are.
  if (outputs == kBlock) return add_at<R, false>(x, from, g, pixels, dw, outputs);
  float packed[kChunk * R];
  for (int64_t p = 0; p < pixels; p++) std::memcpy(packed + p * R, x + from[p], sizeof(float) * R);
  for (int64_t k = 0; k < outputs; k += kBlock, g += pixels * kBlock)
    add_at<R, true>(packed, nullptr, g, pixels, dw + k, outputs);
}

// The gradient in the kernel: each thread has some of its weights, and goes through all pixels.
ffi::Error KernelGradient(ffi::ThreadPool pool, Buffer x, Buffer g, Result w, int64_t down,
                          int64_t right, int64_t top, int64_t left, bool alone) {
  const Conv c = read(x.dimensions(), w->dimensions(), g.dimensions(), down, right, top, left);
  if (c.outputs % kBlock) return refused();
  std::fill_n(w->typed_data(), w->element_count(), 0.0f);
  if (w->element_count() == 0 || g.element_count() == 0) return ffi::Error::Success();
  const Image image = c.padded();
  const Places places = c.patches();
  const int64_t number = x.dimensions()[0], group = group_of(places, number);
  const int64_t run = c.columns * c.channels, pieces = (run + kRows - 1) / kRows;
  const int64_t threads = alone ? 1 : std::max<int64_t>(1, pool.num_threads());
  const int64_t tasks = std::min(threads, c.rows * pieces), all = c.rows * pieces;
  spread(pool, alone, tasks, [&](int64_t task) {
    static thread_local Room room, blocks;
    static thread_local std::vector<int64_t> from;
    blocks.resize(kChunk * c.outputs);
    for (int64_t first = 0; first < number; first += group) {
      const int64_t count = std::min(group, number - first);
      const float* padded = pad_all(image, x.typed_data() + first * image.size(), count, room);
      from.clear();
      for (int64_t n = 0; n < count; n++)
        for (const int64_t at : places.from) from.push_back(at + n * image.padded());
      const float* gradient = g.typed_data() + first * places.from.size() * c.outputs;
      for (int64_t q = 0; q < (int64_t)from.size(); q += kChunk) {
        const int64_t pixels = std::min<int64_t>(kChunk, from.size() - q);
        const float* some = gradient + q * c.outputs;
        if (c.outputs > kBlock) {
          for (int64_t k = 0; k < c.outputs; k += kBlock)
            for (int64_t p = 0; p < pixels; p++)
              std::memcpy(blocks.data() + k * pixels + p * kBlock, some + p * c.outputs + k,
                          sizeof(float) * kBlock);
          some = blocks.data();
        }
        for (int64_t piece = all * task / tasks; piece < all * (task + 1) / tasks; piece++) {
          const int64_t i = piece / pieces, r = piece % pieces * kRows;
          const float* at = padded + i * image.wide * c.channels + r;
          float* dw = w->typed_data() + (i * run + r) * c.outputs;
          of_size(std::min(kRows, run - r), [&](auto size) {
            add_all<decltype(size)::value>(at, &from[q], some, pixels, dw, c.outputs);
          });
        }
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define NADAPTOR_DEFINE(symbol, function)                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function,                                           \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>()       \
                                    .Arg<Buffer>().Ret<Buffer>().Attr<int64_t>("down")      \
                                    .Attr<int64_t>("right").Attr<int64_t>("top")            \
                                    .Attr<int64_t>("left").Attr<bool>("alone"))

NADAPTOR_DEFINE(NadaptorConvolve, Convolve);
NADAPTOR_DEFINE(NadaptorImageGradient, ImageGradient);
NADAPTOR_DEFINE(NadaptorKernelGradient, KernelGradient);
