// 2-D convolutions of float32 or float64 [b, h, w, c] maps for XLA's CPU backend: outputs, input gradients, kernel
// gradients. See library.py for the contract.
//
// An output tile of kTileRows pixels by up to two vectors of channels stays in registers while the sum runs over the
// window: one broadcast input value meets kVectors loaded weights. A window's row is contiguous in memory (its pixels
// are neighbours, its channels innermost), so the sum is kernel_height runs of kernel_width * channels values, whatever
// the kernel's size. Borders are zeros in a copy of the few input rows at hand, which stays in cache.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 14;  // 28 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 14;
#else
constexpr int kVectorBytes = 16, kTileRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int64_t kBandBytes = 192 * 1024;  // of input rows at hand: with the weights, they fit a core's L2 cache
constexpr int64_t kPixelsWorthASum = 2048;  // adding up two sums of a kernel's gradient is little beside so many
constexpr int64_t kValuesWorthATask = 16 * 1024;  // that are copied
// Up to so many pixels of output packing weights costs more than it saves, if a row of them lies within a page's reach.
constexpr int64_t kUnpackedPixels = 4096, kUnpackedBytes = 512;

template <typename T>
struct Lanes {
  static constexpr int kCount = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The channels of an output that tiles compute at a time, from a multiple of kMost on: `lanes`, in whole vectors.
template <typename T>
struct Chunk {
  static constexpr int64_t kMost = kVectors * Lanes<T>::kCount;
  int64_t first, lanes;
  int vectors;

  Chunk(int64_t channels, int64_t index)
      : first(index * kMost),
        lanes(std::min(kMost, channels - first)),
        vectors(static_cast<int>(DivideUp(lanes, Lanes<T>::kCount))) {}
  int64_t width() const { return vectors * Lanes<T>::kCount; }
  static int64_t Count(int64_t channels) { return DivideUp(channels, kMost); }
};

// Runs task(0) ... task(count - 1) on the pool and the calling thread, which never waits for a task nobody has begun.
void ParallelFor(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count, done = 0;
    const std::function<void(int64_t)>* task;
    std::mutex mutex;
    std::condition_variable all_done;
    void Work() {
      int64_t mine = 0;
      for (int64_t i; (i = next.fetch_add(1)) < count; ++mine) (*task)(i);
      if (mine == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      if ((done += mine) == count) all_done.notify_all();
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->count = count;
  shared->task = &task;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
}

template <typename T>
class Scratch {  // a thread's own memory, aligned to cache lines and kept between calls
 public:
  T* Get(int slot, int64_t count) {
    std::vector<char>& memory = memory_[slot];
    if (memory.size() < count * sizeof(T) + 64) memory.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<char> memory_[3];
};

template <typename T>
T* ThreadScratch(int slot, int64_t count) {
  static thread_local Scratch<T> scratch;
  return scratch.Get(slot, count);
}

template <typename T>
std::unique_ptr<T[], void (*)(T*)> Allocate(int64_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<int64_t>(count, 1) * sizeof(T))) throw std::bad_alloc();
  return {static_cast<T*>(memory), [](T* p) { free(p); }};
}

// Writes the first lanes of each row.
template <typename T, int M, int N>
inline void StoreTile(const typename Lanes<T>::Vector (&sum)[M][N], T* to, int64_t step, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    if (lanes == N * kLanes) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) *reinterpret_cast<Vector*>(to + m * step + n * kLanes) = sum[m][n];
    } else {
      std::memcpy(to + m * step, sum[m], lanes * sizeof(T));
    }
  }
}

// y[m, :] = sum over (r, j) of x[r * row_step + m * pixel_step + j] * w[r * run + j, :], for M pixels, N vectors.
template <typename T, int M, int N>
void OutputTile(T* y, int64_t y_step, const T* x, int64_t pixel_step, int64_t row_step, const T* w, int64_t w_step,
                int64_t rows, int64_t run, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  Vector sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = Vector{};
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * row_step;
    for (int64_t j = 0; j < run; ++j, w += w_step) {
      Vector weights[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) weights[n] = *reinterpret_cast<const Vector*>(w + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vector value = from[m * pixel_step + j] - Vector{};
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[m][n] += value * weights[n];
      }
    }
  }
  StoreTile<T, M, N>(sum, y, y_step, lanes);
}

// dw[m, :] = sum over pixels of x[pixel][m] * g[pixel][:], for M window values, N vectors of output channels; with
// `before`, that [M][N vectors] is added.
template <typename T, int M, int N>
void KernelTile(T* dw, int64_t dw_step, const T* before, const T* x, int64_t pixel_step, int64_t row_step, const T* g,
                int64_t g_row_step, int64_t rows, int64_t columns, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  Vector sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
      sum[m][n] = before == nullptr ? Vector{} : *reinterpret_cast<const Vector*>(before + (m * N + n) * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * row_step;
    const T* gradient = g + r * g_row_step;
    for (int64_t c = 0; c < columns; ++c, from += pixel_step, gradient += N * kLanes) {
      Vector gradients[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) gradients[n] = *reinterpret_cast<const Vector*>(gradient + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vector value = from[m] - Vector{};
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[m][n] += value * gradients[n];
      }
    }
  }
  StoreTile<T, M, N>(sum, dw, dw_step, lanes);
}

template <typename T>
using OutputTileFn = decltype(&OutputTile<T, 1, 1>);
template <typename T>
using KernelTileFn = decltype(&KernelTile<T, 1, 1>);

template <typename T, int... M>
OutputTileFn<T> OutputTileOf(int rows, int vectors, std::integer_sequence<int, M...>) {
  static constexpr OutputTileFn<T> table[2][sizeof...(M)] = {{OutputTile<T, M + 1, 1>...}, {OutputTile<T, M + 1, 2>...}};
  return table[vectors - 1][rows - 1];
}

template <typename T, int... M>
KernelTileFn<T> KernelTileOf(int rows, int vectors, std::integer_sequence<int, M...>) {
  static constexpr KernelTileFn<T> table[2][sizeof...(M)] = {{KernelTile<T, M + 1, 1>...}, {KernelTile<T, M + 1, 2>...}};
  return table[vectors - 1][rows - 1];
}

constexpr auto kTiles = std::make_integer_sequence<int, kTileRows>{};

// Calls tile(begin, size) for `count` cut into the fewest tiles, all of nearly the same size.
template <typename F>
void ForTiles(int64_t count, F tile) {
  const int64_t tiles = DivideUp(count, kTileRows);
  for (int64_t i = 0, begin = 0; i < tiles; ++i) {
    const int64_t end = count * (i + 1) / tiles;
    tile(begin, static_cast<int>(end - begin));
    begin = end;
  }
}

struct Sizes {
  int64_t batch, height, width, channels;       // of the input
  int64_t out_height, out_width, out_channels;  // of the output
  int64_t kernel_height, kernel_width, stride, padding;

  int64_t run() const { return kernel_width * channels; }
  int64_t padded_width() const { return width + 2 * padding; }
  // Without a window, pixels are one long row; cut into lines of some length, the last one shorter.
  bool pointwise() const { return kernel_height == 1 && kernel_width == 1 && padding == 0 && stride == 1; }
};

// How a map is read: relu(scale * x^ + bias) of its first channels, `step` a pixel; without scale, x itself. x^ is x or,
// with a mean, (x - mean) * reciprocal.
template <typename T>
struct Source {
  const T *x, *mean, *reciprocal, *scale, *bias;
  int64_t step;

  Source From(int64_t channel) const {
    const auto at = [&](const T* p) { return p == nullptr ? p : p + channel; };
    return {x + channel, at(mean), at(reciprocal), at(scale), at(bias), step};
  }
  Source AtPixel(int64_t pixel) const { return {x + pixel * step, mean, reciprocal, scale, bias, step}; }
};

template <bool kNormalise, typename T>
inline T Normalised(const Source<T>& source, int64_t c) {
  return kNormalise ? (source.x[c] - source.mean[c]) * source.reciprocal[c] : source.x[c];
}

template <bool kNormalise, typename T>
void RectifyPixels(Source<T> source, int64_t pixels, int64_t channels, T* to) {
  for (int64_t p = 0; p < pixels; ++p, source.x += source.step, to += channels) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const T value = source.scale[c] * Normalised<kNormalise>(source, c) + source.bias[c];
      to[c] = value > T{0} ? value : T{0};
    }
  }
}

template <typename T>
void ReadPixels(const Source<T>& source, int64_t pixels, int64_t channels, T* to) {
  if (source.scale == nullptr) {
    const bool whole = source.step == channels;
    const int64_t runs = whole ? 1 : pixels, run = whole ? pixels * channels : channels;
    for (int64_t i = 0; i < runs; ++i) std::memcpy(to + i * run, source.x + i * source.step, run * sizeof(T));
  } else if (source.mean == nullptr) {
    RectifyPixels<false>(source, pixels, channels, to);
  } else {
    RectifyPixels<true>(source, pixels, channels, to);
  }
}

// What is read of the rows under output rows [begin, end) of an image, borders included; the last row may be shorter.
template <typename T>
const T* InputRows(const Sizes& s, const Source<T>& source, int64_t image, int64_t begin, int64_t end, int64_t pixels) {
  const int64_t first = begin * s.stride - s.padding, count = (end - begin - 1) * s.stride + s.kernel_height;
  const int64_t pixel = (image * s.height + first) * s.width;
  if (s.padding == 0) {
    const Source<T> from = source.AtPixel(pixel);
    if (source.scale == nullptr && source.step == s.channels) return from.x;
    const int64_t left = s.pointwise() ? pixels - pixel : count * s.width;
    const int64_t most = std::min(count * s.width, left);
    T* to = ThreadScratch<T>(0, count * s.width * s.channels);
    ReadPixels(from, most, s.channels, to);
    return to;
  }
  const int64_t line = s.padded_width() * s.channels, border = s.padding * s.channels;
  T* rows = ThreadScratch<T>(0, count * line);
  for (int64_t r = 0; r < count; ++r) {
    T* to = rows + r * line;
    if (first + r < 0 || first + r >= s.height) {
      std::fill(to, to + line, T{0});
      continue;
    }
    std::fill(to, to + border, T{0});
    ReadPixels(source.AtPixel(pixel + r * s.width), s.width, s.channels, to + border);
    std::fill(to + line - border, to + line, T{0});
  }
  return rows;
}

// How the output is cut into tasks: bands of rows (or, pointwise, of pixels) that keep their inputs in cache.
struct Bands {
  int64_t rows_each, per_image, count;

  Bands(const Sizes& s, int64_t element_bytes, int64_t threads) {
    const int64_t line = s.padded_width() * std::max(s.channels, s.out_channels) * element_bytes;
    rows_each = std::clamp<int64_t>((kBandBytes / line - s.kernel_height) / s.stride + 1, 1, s.out_height);
    while (rows_each > 1 && DivideUp(s.out_height, rows_each) * s.batch < 8 * threads) rows_each = (rows_each + 1) / 2;
    per_image = DivideUp(s.out_height, rows_each);
    count = per_image * s.batch;
  }
};

// A pointwise convolution as one of lines: every line some pixels of one "image"; the last line may be shorter.
Sizes AsLines(Sizes s, int64_t element_bytes) {
  const int64_t most = kBandBytes / (std::max(s.channels, s.out_channels) * element_bytes * kTileRows);
  const int64_t line = std::clamp<int64_t>(most, 1, 8) * kTileRows;
  s.out_height = s.height = DivideUp(s.batch * s.height * s.width, line);
  s.out_width = s.width = line;
  s.batch = 1;
  return s;
}

// The weights [taps][inputs][outputs] of a convolution, of which it uses some. Of a convolution in groups they are those
// of `together` groups from group `first` on, as if it had no groups: zero between one group and another. Transposed:
// what the input's gradient takes, taps reversed and the two kinds of channels exchanged.
template <typename T>
struct Kernel {
  const T* w;
  int64_t outputs, first, together;
  bool transposed;
};

// Pack of a kernel that lies as it is read, in no groups: row by row, as memory is fetched.
template <typename T>
void PackRows(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, T* packed) {
  const int64_t rows = s.kernel_height * s.run(), chunks = Chunk<T>::Count(s.out_channels);
  const int64_t tasks = std::clamp<int64_t>(rows * s.out_channels / kValuesWorthATask, 1, 4 * pool.num_threads());
  ParallelFor(pool, tasks, [&](int64_t task) {
    for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
      const T* from = kernel.w + row * kernel.outputs + kernel.first * s.out_channels;
      for (int64_t index = 0; index < chunks; ++index) {
        const Chunk<T> chunk(s.out_channels, index);
        T* to = packed + chunk.first * rows + row * chunk.width();
        if (chunk.lanes == Chunk<T>::kMost) {
          std::memcpy(to, from + chunk.first, Chunk<T>::kMost * sizeof(T));
        } else {
          std::memcpy(to, from + chunk.first, chunk.lanes * sizeof(T));
          std::fill(to + chunk.lanes, to + chunk.width(), T{0});
        }
      }
    }
  });
}

// The first half of two vectors' values by turns, or the second one.
template <bool kSecond, typename Vector, int... I>
inline Vector Zip(Vector a, Vector b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I), kFrom = kSecond ? kLanes / 2 : 0;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFrom + I / 2 + I % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){(kFrom + I / 2 + I % 2 * kLanes)...});
#endif
}

// to[c][r] = from[r][c] of as many rows and columns as a vector has values: with every round of zips, an index of the
// row becomes one of the column.
template <typename T>
void TransposeSquare(const T* from, int64_t from_step, T* to, int64_t to_step) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>{};
  Vector rows[kLanes], zipped[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) rows[r] = *reinterpret_cast<const Vector*>(from + r * from_step);
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < kLanes / 2; ++r) {
      zipped[2 * r] = Zip<false>(rows[r], rows[r + kLanes / 2], kIndices);
      zipped[2 * r + 1] = Zip<true>(rows[r], rows[r + kLanes / 2], kIndices);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) rows[r] = zipped[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) *reinterpret_cast<Vector*>(to + r * to_step) = rows[r];
}

// Pack of a kernel that is read transposed, in no groups.
template <typename T>
void PackTransposed(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, T* packed) {
  constexpr int kLanes = Lanes<T>::kCount;
  const int64_t taps = s.kernel_height * s.kernel_width;
  ParallelFor(pool, Chunk<T>::Count(s.out_channels) * taps, [&](int64_t task) {
    const Chunk<T> chunk(s.out_channels, task / taps);
    const int64_t tap = task % taps, width = chunk.width();
    const T* w = kernel.w + ((taps - 1 - tap) * s.out_channels + chunk.first) * kernel.outputs;
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      for (int64_t o = 0; o < width; o += kLanes) {
        const T* from = w + o * kernel.outputs + kernel.first * s.channels + c;
        T* to = packed + chunk.first * taps * s.channels + (tap * s.channels + c) * width + o;
        const int64_t rows = std::min<int64_t>(kLanes, chunk.lanes - o);
        const int64_t columns = std::min<int64_t>(kLanes, s.channels - c);
        if (rows == kLanes && columns == kLanes) {
          TransposeSquare(from, kernel.outputs, to, width);
          continue;
        }
        for (int64_t i = 0; i < columns; ++i)
          for (int64_t r = 0; r < kLanes; ++r) to[i * width + r] = r < rows ? from[r * kernel.outputs + i] : T{0};
      }
    }
  });
}

// A kernel's weights to [chunk][taps][channels][vectors of out].
template <typename T>
void Pack(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, T* packed) {
  if (kernel.together == 1) return (kernel.transposed ? PackTransposed<T> : PackRows<T>)(pool, s, kernel, packed);
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t group_channels = s.channels / kernel.together, group_outputs = s.out_channels / kernel.together;
  ParallelFor(pool, Chunk<T>::Count(s.out_channels), [&](int64_t index) {
    const Chunk<T> chunk(s.out_channels, index);
    const int64_t first = chunk.first, lanes = chunk.lanes, width = chunk.width();
    T* to = packed + first * taps * s.channels;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t group = 0; group < kernel.together; ++group) {
        const int64_t of_group = group * group_outputs;
        const int64_t begin = std::clamp<int64_t>(of_group - first, 0, lanes);
        const int64_t end = std::clamp<int64_t>(of_group + group_outputs - first, 0, lanes);
        const int64_t begin_in_group = first + begin - of_group, of_all = kernel.first + group;
        for (int64_t c = 0; c < group_channels; ++c, to += width) {
          std::fill(to, to + begin, T{0});
          if (kernel.transposed) {
            const T* from = kernel.w + ((taps - 1 - tap) * group_outputs + begin_in_group) * kernel.outputs +
                            of_all * group_channels + c;
            for (int64_t o = begin; o < end; ++o, from += kernel.outputs) to[o] = *from;
          } else if (begin < end) {
            std::memcpy(to + begin,
                        kernel.w + (tap * group_channels + c) * kernel.outputs + of_all * group_outputs + begin_in_group,
                        (end - begin) * sizeof(T));
          }
          std::fill(to + std::max(begin, end), to + width, T{0});
        }
      }
    }
  });
}

// Weights as tiles read them: packed, or where they lie, if few tiles would read what packing reads and writes.
template <typename T>
class Weights {
 public:
  Weights(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel) : packed_(nullptr, [](T*) {}) {
    constexpr int kLanes = Lanes<T>::kCount;
    const int64_t window = s.kernel_height * s.run(), pixels = s.batch * s.out_height * s.out_width;
    const bool whole = !kernel.transposed && kernel.together == 1 && s.out_channels % kLanes == 0;
    if (whole && pixels <= kUnpackedPixels && kernel.outputs * static_cast<int64_t>(sizeof(T)) <= kUnpackedBytes) {
      weights_ = kernel.w + kernel.first * s.out_channels, chunk_step_ = 1, step_ = kernel.outputs;
      return;
    }
    packed_ = Allocate<T>(window * DivideUp(s.out_channels, kLanes) * kLanes);
    Pack(pool, s, kernel, packed_.get());
    weights_ = packed_.get(), chunk_step_ = window, step_ = 0;
  }
  const T* Of(const Chunk<T>& chunk) const { return weights_ + chunk.first * chunk_step_; }
  int64_t Step(const Chunk<T>& chunk) const { return step_ ? step_ : chunk.width(); }

 private:
  std::unique_ptr<T[], void (*)(T*)> packed_;
  const T* weights_;
  int64_t chunk_step_, step_;
};

template <typename T>
struct Prepared {  // a convolution cut into bands, and its weights
  Sizes sizes;
  int64_t pixels;
  Weights<T> weights;
  Bands bands;

  Prepared(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, int64_t threads)
      : sizes(s.pointwise() ? AsLines(s, sizeof(T)) : s),
        pixels(s.batch * s.out_height * s.out_width),
        weights(pool, s, kernel),
        bands(sizes, sizeof(T), threads) {}
};

// Computes a band of outputs, of y_step channels a pixel, and calls done(first pixel, pixels, their y); where y is null,
// that lies in the thread's own memory and is gone afterwards.
template <typename T, typename F>
void OutputBand(const Prepared<T>& prepared, int64_t band, const Source<T>& source, T* y, int64_t y_step, F done) {
  const auto& [s, all_pixels, weights, bands] = prepared;
  const int64_t row_step = s.padded_width() * s.channels, pixel_step = s.stride * s.channels;
  const int64_t image = band / bands.per_image, begin = band % bands.per_image * bands.rows_each;
  const int64_t end = std::min(begin + bands.rows_each, s.out_height);
  const int64_t at = (image * s.out_height + begin) * s.out_width;
  const int64_t count = std::min((end - begin) * s.out_width, all_pixels - at);
  const T* rows = InputRows(s, source, image, begin, end, all_pixels);
  T* out = y == nullptr ? ThreadScratch<T>(2, count * y_step) : y + at * y_step;
  for (int64_t index = 0; index < Chunk<T>::Count(s.out_channels); ++index) {
    const Chunk<T> chunk(s.out_channels, index);
    for (int64_t row = 0; row < end - begin; ++row) {
      const int64_t columns = std::min(s.out_width, count - row * s.out_width);
      const T* from = rows + row * s.stride * row_step;
      T* to = out + row * s.out_width * y_step + chunk.first;
      ForTiles(columns, [&](int64_t column, int tile) {
        OutputTileOf<T>(tile, chunk.vectors, kTiles)(to + column * y_step, y_step, from + column * pixel_step,
                                                     pixel_step, row_step, weights.Of(chunk), weights.Step(chunk),
                                                     s.kernel_height, s.run(), chunk.lanes);
      });
    }
  }
  done(at, count, out);
}

// Convolutions of s side by side: `blocks` of them, each of its own channels and with its weights, all cut alike.
template <typename T>
class Blocks {
 public:
  // The kernel is that of the first block.
  Blocks(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, Kernel<T> kernel) : pool_(pool) {
    for (int64_t i = 0; i < blocks; ++i, kernel.first += kernel.together)
      prepared_.emplace_back(pool, s, kernel, DivideUp(pool.num_threads(), blocks));
  }

  int64_t count() const { return static_cast<int64_t>(prepared_.size()); }
  int64_t bands() const { return prepared_[0].bands.count; }

  // Runs run(block, band), on all threads; it is to call Band.
  template <typename F>
  void ForBands(F run) const {
    ParallelFor(pool_, count() * bands(), [&](int64_t task) { run(task / bands(), task % bands()); });
  }

  // OutputBand of a block, the source that of the first one; done(at, count, y).
  template <typename F>
  void Band(int64_t block, int64_t band, const Source<T>& source, T* y, int64_t y_step, F done) const {
    const Prepared<T>& p = prepared_[block];
    OutputBand<T>(p, band, source.From(block * p.sizes.channels), y, y_step, done);
  }

 private:
  ffi::ThreadPool& pool_;
  std::vector<Prepared<T>> prepared_;
};

// y = what is read of the source, convolved.
template <typename T>
void Output(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& source, Kernel<T> kernel, T* y) {
  const Blocks<T> all(pool, s, blocks, kernel);
  all.ForBands([&](int64_t block, int64_t band) {
    T* own = y + block * s.out_channels;
    all.Band(block, band, source, own, blocks * s.out_channels, [](int64_t, int64_t, T*) {});
  });
}

// Two sums over all pixels for each channel, of `channels` each in `blocks` blocks, added up from those of bands in the
// bands' order, whichever threads made them.
template <typename T>
class TwoSums {
 public:
  TwoSums(int64_t blocks, int64_t bands, int64_t channels)
      : blocks_(blocks), bands_(bands), channels_(channels), sums_(Allocate<T>(blocks * bands * 2 * channels)) {}

  T* Of(int64_t block, int64_t band) {  // zeros at first: the first sums, behind them the second
    T* sums = sums_.get() + (block * bands_ + band) * 2 * channels_;
    std::fill(sums, sums + 2 * channels_, T{0});
    return sums;
  }

  void AddUp(T* first, T* second) const {
    for (int64_t block = 0; block < blocks_; ++block, first += channels_, second += channels_) {
      std::fill(first, first + channels_, T{0});
      std::fill(second, second + channels_, T{0});
      for (int64_t band = 0; band < bands_; ++band) {
        const T* sums = sums_.get() + (block * bands_ + band) * 2 * channels_;
        for (int64_t c = 0; c < channels_; ++c) first[c] += sums[c], second[c] += sums[channels_ + c];
      }
    }
  }

 private:
  const int64_t blocks_, bands_, channels_;
  std::unique_ptr<T[], void (*)(T*)> sums_;
};

// Output, with kAdd added to what y holds, and the sums over all pixels of y - shift and of its square.
template <bool kAdd, typename T>
void OutputWithMoments(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& source, Kernel<T> kernel,
                       const T* shift, T* y, T* sum, T* square) {
  const Blocks<T> all(pool, s, blocks, kernel);
  const int64_t channels = s.out_channels, y_step = blocks * channels;
  TwoSums<T> sums(blocks, all.bands(), channels);
  all.ForBands([&](int64_t block, int64_t band) {
    const T* about = shift + block * channels;
    T* own = y + block * channels;
    const auto take_in = [&](int64_t at, int64_t count, T* out) {
      T *sum = sums.Of(block, band), *square = sum + channels, *to = own + at * y_step;
      for (int64_t i = 0; i < count; ++i, out += kAdd ? channels : y_step, to += y_step) {
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          const T value = kAdd ? to[c] + out[c] : out[c], centred = value - about[c];
          if (kAdd) to[c] = value;
          sum[c] += centred;
          square[c] += centred * centred;
        }
      }
    };
    all.Band(block, band, source, kAdd ? nullptr : own, kAdd ? channels : y_step, take_in);
  });
  sums.AddUp(sum, square);
}

// The gradient of the x^ of relu(scale * x^ + bias), from that of the rectified values: added to what `to` holds with
// kAdd; and, summed, those of scale and of bias.
template <bool kAdd, bool kNormalise, typename T>
void UnrectifyPixels(Source<T> read, int64_t pixels, int64_t channels, const T* gradient, T* to, int64_t to_step,
                     T* of_scale, T* of_bias) {
  for (int64_t i = 0; i < pixels; ++i, read.x += read.step, to += to_step, gradient += channels) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const T x = Normalised<kNormalise>(read, c);
      const T open = read.scale[c] * x + read.bias[c] > T{0} ? gradient[c] : T{0};
      of_bias[c] += open;
      of_scale[c] += open * x;
      to[c] = (kAdd ? to[c] : T{0}) + open * read.scale[c];
    }
  }
}

// The gradient of relu(scale * x^ + bias) convolved with w, given that of the output (source g): that of x^, of dx_step
// channels a pixel and with kAdd added to what is there, and, summed over all pixels, those of scale and bias. s are the
// sizes of each block's transposed convolution.
template <bool kAdd, typename T>
void ReadGradient(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& g, Kernel<T> kernel,
                  const Source<T>& read, T* dx, int64_t dx_step, T* dscale, T* dbias) {
  const Blocks<T> all(pool, s, blocks, kernel);
  const int64_t channels = s.out_channels;
  TwoSums<T> sums(blocks, all.bands(), channels);
  all.ForBands([&](int64_t block, int64_t band) {
    const Source<T> own = read.From(block * channels);
    const auto unrectify = [&](int64_t at, int64_t count, T* gradient) {
      const auto run = own.mean == nullptr ? UnrectifyPixels<kAdd, false, T> : UnrectifyPixels<kAdd, true, T>;
      T *of_scale = sums.Of(block, band), *to = dx + at * dx_step + block * channels;
      run(own.AtPixel(at), count, channels, gradient, to, dx_step, of_scale, of_scale + channels);
    };
    all.Band(block, band, g, nullptr, channels, unrectify);
  });
  sums.AddUp(dscale, dbias);
}

// Some channels of pixels of a gradient, of `step` channels each, side by side and filled up to whole vectors.
template <typename T>
const T* WholeVectors(const T* g, int64_t step, int64_t pixels, int64_t channels, int64_t width) {
  T* to = ThreadScratch<T>(1, pixels * width);
  for (int64_t p = 0; p < pixels; ++p) {
    std::memcpy(to + p * width, g + p * step, channels * sizeof(T));
    std::fill(to + p * width + channels, to + (p + 1) * width, T{0});
  }
  return to;
}

// How a kernel's gradient is shared out: each task has some of its columns, by chunks, and sums over some of the bands.
struct Shares {
  int64_t parts, slices;

  Shares(int64_t threads, int64_t chunks, int64_t pixels, int64_t bands) {
    slices = std::clamp<int64_t>(pixels / kPixelsWorthASum, 1, threads);
    parts = std::max<int64_t>(1, std::min(DivideUp(threads, slices), chunks));
    slices = std::min(DivideUp(threads, parts), bands);
  }
};

// The kernel's gradient of `blocks` convolutions of s, whose channels lie side by side, each of `together` groups: of a
// block's products those of a group's own channels are taken.
template <typename T>
void KernelGradient(ffi::ThreadPool& pool, Sizes s, int64_t blocks, int64_t together, const Source<T>& source,
                    const T* g, T* dw) {
  const int64_t window = s.kernel_height * s.run(), pixels = s.batch * s.out_height * s.out_width;
  const int64_t chunks = Chunk<T>::Count(s.out_channels);
  const bool pointwise = s.pointwise();
  if (pointwise) s = AsLines(s, sizeof(T));
  const Bands bands(s, sizeof(T), 1);
  const int64_t row_step = s.padded_width() * s.channels, pixel_step = s.stride * s.channels;
  // A sum for each slice, whichever thread computes it: the result is the same always.
  const Shares shares(DivideUp(pool.num_threads(), blocks), chunks, pixels, bands.count);
  const int64_t slices = shares.slices, g_step = blocks * s.out_channels;
  const bool whole = blocks == 1 && together == 1 && slices == 1;  // the last band's sums are the result
  auto sums = Allocate<T>(blocks * slices * chunks * window * Chunk<T>::kMost);
  const auto sums_of = [&](int64_t block, int64_t slice, int64_t chunk) {
    return sums.get() + ((block * slices + slice) * chunks + chunk) * window * Chunk<T>::kMost;
  };
  ParallelFor(pool, blocks * slices * shares.parts, [&](int64_t task) {
    const int64_t part = task % shares.parts, slice = task / shares.parts % slices;
    const int64_t block = task / shares.parts / slices;
    const Source<T> from = source.From(block * s.channels);
    const int64_t first_band = bands.count * slice / slices, end_band = bands.count * (slice + 1) / slices;
    for (int64_t band = first_band; band < end_band; ++band) {
      const int64_t image = band / bands.per_image, begin = band % bands.per_image * bands.rows_each;
      const int64_t end = std::min(begin + bands.rows_each, s.out_height), at = (image * s.out_height + begin) * s.out_width;
      const T* rows = InputRows(s, from, image, begin, end, pixels);
      int64_t lines = end - begin, columns = s.out_width;
      if (pointwise) {
        columns = std::min(lines * columns, pixels - at);
        lines = 1;
      }
      const bool is_result = whole && band == end_band - 1;
      for (int64_t index = chunks * part / shares.parts; index < chunks * (part + 1) / shares.parts; ++index) {
        const Chunk<T> chunk(s.out_channels, index);
        const int64_t width = chunk.width();
        const T* gradients = WholeVectors(g + at * g_step + block * s.out_channels + chunk.first, g_step,
                                          lines * columns, chunk.lanes, width);
        T* own = sums_of(block, slice, index);
        for (int64_t r = 0; r < s.kernel_height; ++r) {
          ForTiles(s.run(), [&](int64_t value, int count) {
            const int64_t at_value = r * s.run() + value;
            T* sum = own + at_value * width;
            KernelTileOf<T>(count, chunk.vectors, kTiles)(
                is_result ? dw + at_value * g_step + chunk.first : sum, is_result ? g_step : width,
                band == first_band ? nullptr : sum, rows + r * row_step + value, pixel_step, s.stride * row_step,
                gradients, columns * width, lines, columns, is_result ? chunk.lanes : width);
          });
        }
      }
    }
  });
  if (whole) return;
  const int64_t inputs = s.channels / together, outputs = s.out_channels / together;
  ParallelFor(pool, s.kernel_height * s.kernel_width * inputs, [&](int64_t value) {
    const int64_t tap = value / inputs, input = value % inputs;
    T* to = dw + value * g_step;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t o = 0; o < s.out_channels; ++o) {
        const int64_t row = tap * s.channels + o / outputs * inputs + input, index = o / Chunk<T>::kMost;
        const Chunk<T> chunk(s.out_channels, index);
        T total = 0;
        for (int64_t slice = 0; slice < slices; ++slice)
          total += sums_of(block, slice, index)[row * chunk.width() + o - chunk.first];
        *to++ = total;
      }
    }
  });
}

// Calls visit(tap, pixel of x) for the taps of a square window that lie inside the image.
template <typename F>
void ForWindow(const Sizes& s, int64_t row, int64_t column, F visit) {
  for (int64_t i = 0; i < s.kernel_height; ++i) {
    const int64_t y = row * s.stride + i - s.padding;
    if (y < 0 || y >= s.height) continue;
    for (int64_t j = 0; j < s.kernel_width; ++j) {
      const int64_t x = column * s.stride + j - s.padding;
      if (x >= 0 && x < s.width) visit(static_cast<int32_t>(i * s.kernel_width + j), y * s.width + x);
    }
  }
}

// dx: the gradient of a window's maximum goes to the first of its largest values.
template <typename T>
void PoolGradient(ffi::ThreadPool& pool, const Sizes& s, const T* x, const T* g, T* dx) {
  ParallelFor(pool, s.batch, [&](int64_t image) {
    const int64_t channels = s.channels, size = s.height * s.width * channels;
    const T* from = x + image * size;
    T* to = dx + image * size;
    std::fill(to, to + size, T{0});
    std::vector<T> best(channels);
    std::vector<int32_t> chosen(channels);
    T* most = best.data();
    int32_t* which = chosen.data();
    for (int64_t row = 0; row < s.out_height; ++row) {
      for (int64_t column = 0; column < s.out_width; ++column) {
        bool first = true;
        ForWindow(s, row, column, [&](int32_t tap, int64_t pixel) {
          const T* values = from + pixel * channels;
          if (first) {
            std::copy(values, values + channels, most);
            std::fill(which, which + channels, tap);
            first = false;
            return;
          }
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) {
            const bool larger = values[c] > most[c];
            which[c] = larger ? tap : which[c];
            most[c] = larger ? values[c] : most[c];
          }
        });
        const T* gradient = g + ((image * s.out_height + row) * s.out_width + column) * channels;
        ForWindow(s, row, column, [&](int32_t tap, int64_t pixel) {
          T* sums = to + pixel * channels;
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) sums[c] += which[c] == tap ? gradient[c] : T{0};
        });
      }
    }
  });
}

using Shape = ffi::Span<const int64_t>;

ffi::Error Invalid(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

// The sizes of a convolution of the first `channels` channels of maps x; false where they are none of its output's.
bool Fit(Sizes& s, Shape x, int64_t channels, Shape y, int64_t kernel_height, int64_t kernel_width, int64_t stride,
         int64_t padding) {
  if (x.size() != 4 || y.size() != 4 || stride < 1 || padding < 0 || channels > x[3]) return false;
  s = {x[0], x[1], x[2], channels, y[1], y[2], y[3], kernel_height, kernel_width, stride, padding};
  return y[0] == s.batch && s.out_height == (s.height + 2 * padding - kernel_height) / stride + 1 &&
         s.out_width == (s.width + 2 * padding - kernel_width) / stride + 1;
}

// Of a reader's scale and bias, and of the mean and reciprocal deviation of what it reads, which are empty where that is
// normalised already.
bool FitReader(Shape x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias) {
  const auto channels = scale.element_count();
  return x.size() == 4 && scale.dimensions().size() == 1 && bias.element_count() == channels &&
         (mean.element_count() == channels || mean.element_count() == 0) &&
         reciprocal.element_count() == mean.element_count() && static_cast<int64_t>(channels) <= x[3];
}

// Cuts sizes of a convolution in groups into those of each block of so many groups; 0 where it can't be cut so.
int64_t CutIntoBlocks(Sizes& s, Shape kernel, int64_t groups, int64_t together) {
  if (together < 1 || groups < together || groups % together || kernel[3] % groups) return 0;
  const int64_t blocks = groups / together;
  s.channels /= blocks, s.out_channels /= blocks;
  return blocks;
}

template <typename T>
Source<T> Plain(ffi::AnyBuffer x) {
  return {x.typed_data<T>(), nullptr, nullptr, nullptr, nullptr, x.dimensions()[3]};
}

template <typename T>
Source<T> Read(ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale,
               ffi::AnyBuffer bias) {
  const bool normalises = mean.element_count() > 0;
  return {x.typed_data<T>(), normalises ? mean.typed_data<T>() : nullptr,
          normalises ? reciprocal.typed_data<T>() : nullptr, scale.typed_data<T>(), bias.typed_data<T>(),
          x.dimensions()[3]};
}

// Calls run with a zero of the buffer's type.
template <typename F>
ffi::Error ForType(ffi::AnyBuffer buffer, F run) {
  if (buffer.element_type() == ffi::F32) {
    run(float{});
  } else if (buffer.element_type() == ffi::F64) {
    run(double{});
  } else {
    return Invalid("expected float32 or float64");
  }
  return ffi::Error::Success();
}

// y = x convolved with w, in groups of which so many are taken together; transposed: x is a gradient of the output and y
// that of the input, stride 1.
ffi::Error OutputCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                      int64_t stride, int64_t padding, bool transposed, int64_t groups, int64_t together) {
  const Shape k = w.dimensions(), to = y->dimensions();
  Sizes s;
  if (k.size() != 4 ||
      !Fit(s, x.dimensions(), transposed ? k[3] : groups * k[2], to, k[0], k[1], stride, padding) ||
      x.dimensions()[3] != s.channels || s.out_channels != (transposed ? groups * k[2] : k[3]))
    return Invalid("shapes of a convolution do not fit");
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a convolution do not fit");
  return ForType(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, transposed};
    Output<T>(pool, s, blocks, Plain<T>(x), kernel, y->typed_data<T>());
  });
}

// dw: the gradient of the kernel, from the input x and the output's gradient g.
ffi::Error KernelGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dw,
                              int64_t stride, int64_t padding, int64_t groups, int64_t together) {
  const Shape k = dw->dimensions();
  Sizes s;
  if (k.size() != 4 || !Fit(s, x.dimensions(), groups * k[2], g.dimensions(), k[0], k[1], stride, padding) ||
      x.dimensions()[3] != s.channels || k[3] != s.out_channels)
    return Invalid("shapes of a convolution's gradient do not fit");
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a convolution's gradient do not fit");
  return ForType(x, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, blocks, together, Plain<T>(x), g.typed_data<T>(), dw->typed_data<T>());
  });
}

// The sizes of a reader of the first channels of x, as many as scale has; 0 blocks where the shapes do not fit.
int64_t FitRead(Sizes& s, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale,
                ffi::AnyBuffer bias, Shape kernel, Shape y, int64_t stride, int64_t padding, int64_t groups,
                int64_t together) {
  if (!FitReader(x.dimensions(), mean, reciprocal, scale, bias) || kernel.size() != 4 ||
      !Fit(s, x.dimensions(), groups * kernel[2], y, kernel[0], kernel[1], stride, padding) ||
      kernel[3] != s.out_channels || static_cast<int64_t>(scale.element_count()) != s.channels)
    return 0;
  return CutIntoBlocks(s, kernel, groups, together);
}

// y = relu(scale * x^ + bias) convolved with w, of the first channels of x, as many as scale has.
ffi::Error ReadCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                    ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                    int64_t stride, int64_t padding, int64_t groups, int64_t together) {
  const Shape k = w.dimensions();
  Sizes s;
  const int64_t blocks =
      FitRead(s, x, mean, reciprocal, scale, bias, k, y->dimensions(), stride, padding, groups, together);
  if (blocks == 0) return Invalid("shapes of a reader do not fit");
  return ForType(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, false};
    Output<T>(pool, s, blocks, Read<T>(x, mean, reciprocal, scale, bias), kernel, y->typed_data<T>());
  });
}

// The same with the sums of y - shift and of its square; with kAdd y holds what is added to it.
template <bool kAdd>
ffi::Error ReadMomentsOf(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                         ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer shift,
                         ffi::AnyBuffer y, ffi::AnyBuffer sum, ffi::AnyBuffer square, int64_t stride, int64_t padding,
                         int64_t groups, int64_t together) {
  const Shape k = w.dimensions();
  Sizes s;
  const int64_t blocks =
      FitRead(s, x, mean, reciprocal, scale, bias, k, y.dimensions(), stride, padding, groups, together);
  const auto outputs = static_cast<size_t>(blocks * s.out_channels);
  if (blocks == 0 || shift.element_count() != outputs || sum.element_count() != outputs ||
      square.element_count() != outputs)
    return Invalid("shapes of a reader with moments do not fit");
  return ForType(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, false};
    OutputWithMoments<kAdd, T>(pool, s, blocks, Read<T>(x, mean, reciprocal, scale, bias), kernel,
                               shift.typed_data<T>(), y.typed_data<T>(), sum.typed_data<T>(), square.typed_data<T>());
  });
}

ffi::Error ReadMomentsCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                           ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer shift,
                           ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> sum,
                           ffi::Result<ffi::AnyBuffer> square, int64_t stride, int64_t padding, int64_t groups,
                           int64_t together) {
  return ReadMomentsOf<false>(pool, x, mean, reciprocal, scale, bias, w, shift, *y, *sum, *square, stride, padding,
                              groups, together);
}

// The same, added to total, whose memory y is.
ffi::Error AddReadMomentsCall(ffi::ThreadPool pool, ffi::AnyBuffer total, ffi::AnyBuffer x, ffi::AnyBuffer mean,
                              ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w,
                              ffi::AnyBuffer shift, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> sum,
                              ffi::Result<ffi::AnyBuffer> square, int64_t stride, int64_t padding, int64_t groups,
                              int64_t together) {
  if (total.untyped_data() != y->untyped_data()) return Invalid("a sum of outputs is not added to in place");
  return ReadMomentsOf<true>(pool, x, mean, reciprocal, scale, bias, w, shift, *y, *sum, *square, stride, padding,
                             groups, together);
}

// The gradients of the x^, scale and bias of a reader at stride 1, given g, that of its output; padding is the
// transposed convolution's. With kAdd dx has all of x's channels and holds what the gradient is added to.
template <bool kAdd>
ffi::Error ReadGradientOf(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                          ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer g,
                          ffi::AnyBuffer dx, ffi::AnyBuffer dscale, ffi::AnyBuffer dbias, int64_t padding,
                          int64_t groups, int64_t together) {
  const Shape k = w.dimensions(), to = dx.dimensions();
  Sizes s;
  if (!FitReader(x.dimensions(), mean, reciprocal, scale, bias) || k.size() != 4 || to.size() != 4 ||
      !Fit(s, g.dimensions(), k[3], to, k[0], k[1], 1, padding) || g.dimensions()[3] != s.channels ||
      groups * k[2] > to[3] || (!kAdd && groups * k[2] != to[3]) ||
      static_cast<int64_t>(scale.element_count()) != groups * k[2] ||
      x.element_count() / x.dimensions()[3] != dx.element_count() / to[3] ||
      dscale.element_count() != scale.element_count() || dbias.element_count() != scale.element_count())
    return Invalid("shapes of a reader's gradient do not fit");
  s.out_channels = groups * k[2];
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a reader's gradient do not fit");
  return ForType(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, true};
    ReadGradient<kAdd, T>(pool, s, blocks, Plain<T>(g), kernel, Read<T>(x, mean, reciprocal, scale, bias),
                          dx.typed_data<T>(), to[3], dscale.typed_data<T>(), dbias.typed_data<T>());
  });
}

ffi::Error ReadGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                            ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer g,
                            ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                            ffi::Result<ffi::AnyBuffer> dbias, int64_t padding, int64_t groups, int64_t together) {
  return ReadGradientOf<false>(pool, x, mean, reciprocal, scale, bias, w, g, *dx, *dscale, *dbias, padding, groups,
                               together);
}

// The same, added to the first channels of total, whose memory dx is.
ffi::Error AddReadGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer total, ffi::AnyBuffer x, ffi::AnyBuffer mean,
                               ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w,
                               ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                               ffi::Result<ffi::AnyBuffer> dbias, int64_t padding, int64_t groups, int64_t together) {
  if (total.untyped_data() != dx->untyped_data()) return Invalid("a sum of gradients is not added to in place");
  return ReadGradientOf<true>(pool, x, mean, reciprocal, scale, bias, w, g, *dx, *dscale, *dbias, padding, groups,
                              together);
}

// The gradient of ReadCall's w.
ffi::Error ReadKernelGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean,
                                  ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                                  ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dw, int64_t stride, int64_t padding,
                                  int64_t groups, int64_t together) {
  Sizes s;
  const int64_t blocks = FitRead(s, x, mean, reciprocal, scale, bias, dw->dimensions(), g.dimensions(), stride,
                                 padding, groups, together);
  if (blocks == 0) return Invalid("shapes of a reader's kernel gradient do not fit");
  return ForType(x, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, blocks, together, Read<T>(x, mean, reciprocal, scale, bias), g.typed_data<T>(),
                      dw->typed_data<T>());
  });
}

// The gradient of x, given g, that of its windows' maxima; windows of window x window, padded on every side.
ffi::Error PoolGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dx,
                            int64_t window, int64_t stride, int64_t padding) {
  Sizes s;
  const Shape shape = x.dimensions();
  if (shape.size() != 4 || padding >= window || dx->element_count() != x.element_count() ||
      !Fit(s, shape, shape[3], g.dimensions(), window, window, stride, padding) || s.out_channels != s.channels)
    return Invalid("shapes of a pooling's gradient do not fit");
  return ForType(x, [&](auto zero) {
    using T = decltype(zero);
    PoolGradient<T>(pool, s, x.typed_data<T>(), g.typed_data<T>(), dx->typed_data<T>());
  });
}

using Buffer = ffi::AnyBuffer;

}  // namespace

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetConvolution, OutputCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<bool>("transposed")
        .Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetKernelGradient, KernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetRead, ReadCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetReadMoments, ReadMomentsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetAddReadMoments, AddReadMomentsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetReadGradient, ReadGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetAddReadGradient, AddReadGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetReadKernelGradient, ReadKernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetPoolGradient, PoolGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("window").Attr<int64_t>("stride").Attr<int64_t>("padding"));
