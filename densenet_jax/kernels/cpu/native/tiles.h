// Tiles of an output and of a kernel's gradient, whose sums stay in registers, and the vectors that hold them.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_TILES_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_TILES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace densenet_jax {

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

template <typename T>
struct Lanes {
  static constexpr int kCount = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

inline int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__AVX2__) && !defined(__AVX512F__)
// Returns a mask of the first `lanes` of eight 32-bit lanes.
inline __m256i FirstLanes(int64_t lanes) {
  const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), numbers);
}
#endif

// Reads a vector's first `lanes` values; the others are 0 and need not be there.
template <typename T>
inline typename Lanes<T>::Vector LoadLanes(const T* from, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  if (lanes == Lanes<T>::kCount) return *reinterpret_cast<const Vector*>(from);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes) - 1), from));
  else
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << lanes) - 1), from));
#elif defined(__AVX2__)
  const __m256i mask = FirstLanes(lanes * sizeof(T) / 4);
  return reinterpret_cast<Vector>(_mm256_maskload_ps(reinterpret_cast<const float*>(from), mask));
#else
  Vector value{};
  for (int64_t i = 0; i < lanes; ++i) value[i] = from[i];
  return value;
#endif
}

// Writes a vector's first `lanes` values.
template <typename T>
inline void StoreLanes(typename Lanes<T>::Vector value, T* to, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  if (lanes == Lanes<T>::kCount) {
    *reinterpret_cast<Vector*>(to) = value;
    return;
  }
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << lanes) - 1), reinterpret_cast<__m512>(value));
  else
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << lanes) - 1), reinterpret_cast<__m512d>(value));
#elif defined(__AVX2__)
  const __m256i mask = FirstLanes(lanes * sizeof(T) / 4);
  _mm256_maskstore_ps(reinterpret_cast<float*>(to), mask, reinterpret_cast<__m256>(value));
#else
  for (int64_t i = 0; i < lanes; ++i) to[i] = value[i];
#endif
}

constexpr int64_t kPixelsInTurn = 16;

// Calls run(first pixel, pixels, channel, lanes) for each vector of channels of a few pixels: short rows of memory are
// read in turn, and what belongs to a channel is read once for all of these pixels.
template <typename T, typename F>
inline void ForVectors(int64_t pixels, int64_t channels, F run) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  for (int64_t pixel = 0; pixel < pixels; pixel += kPixelsInTurn) {
    const int64_t count = std::min(kPixelsInTurn, pixels - pixel);
    int64_t channel = 0;
    for (; channel + kLanes <= channels; channel += kLanes) run(pixel, count, channel, kLanes);
    if (channel < channels) run(pixel, count, channel, channels - channel);
  }
}

// A range of at most kMost output channels that a tile computes: `lanes` of them, in whole vectors.
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
      if (N == 2) *reinterpret_cast<Vector*>(to + m * step) = sum[m][0];
      StoreLanes<T>(sum[m][N - 1], to + m * step + (N - 1) * kLanes, lanes - (N - 1) * kLanes);
    }
  }
}

// Adds x[m * step] * w[:] to sum[m], for M values and N vectors.
template <typename T, int M, int N>
[[gnu::always_inline]] inline void AddProducts(typename Lanes<T>::Vector (&sum)[M][N], const T* x, int64_t step,
                                               const T* w) {
  using Vector = typename Lanes<T>::Vector;
  Vector weights[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) weights[n] = *reinterpret_cast<const Vector*>(w + n * Lanes<T>::kCount);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const Vector value = x[m * step] - Vector{};
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] += value * weights[n];
  }
}

// Computes y[m, :] = sum over (r, j) of x[r * row_step + m * pixel_step + j] * w[r * run + j, :], for M pixels and N
// vectors of output channels.
template <typename T, int M, int N>
void OutputTile(T* y, int64_t y_step, const T* x, int64_t pixel_step, int64_t row_step, const T* w, int64_t w_step,
                int64_t rows, int64_t run, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  Vector sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = Vector{};
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * row_step;
    for (int64_t j = 0; j < run; ++j, w += w_step) AddProducts<T, M, N>(sum, from + j, pixel_step, w);
  }
  StoreTile<T, M, N>(sum, y, y_step, lanes);
}

constexpr int64_t kAheadInputs = 16, kLineBytes = 64;

// What is multiplied after these tiles, `width` values for an input: each tile fetches a share of it, `lines` lines of
// cache from `at` on with every kAheadInputs inputs.
struct Ahead {
  const char* at;
  int64_t lines;

  template <typename T>
  Ahead(const T* from, int64_t width, int64_t tiles)
      : at(reinterpret_cast<const char*>(from)),
        lines(DivideUp(kAheadInputs * width * static_cast<int64_t>(sizeof(T)) / kLineBytes, tiles)) {}

  // Goes on behind the shares of so many tiles.
  void Skip(int64_t inputs, int64_t tiles = 1) { at += tiles * lines * kLineBytes * DivideUp(inputs, kAheadInputs); }
};

// Computes y[m, :] = sum over j of x[m * pixel_step + j] * w[j, :], for M pixels and N vectors of output channels; with
// kAdd adds it to y, of whole vectors. It fetches its share of what lies ahead.
template <typename T, int M, int N, bool kAdd>
void PixelTile(T* y, int64_t y_step, const T* x, int64_t pixel_step, const T* w, int64_t w_step, int64_t inputs,
               int64_t lanes, Ahead ahead) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  Vector sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      if (kAdd) __builtin_prefetch(y + m * y_step + n * kLanes, 1);
      sum[m][n] = Vector{};
    }
  for (int64_t j = 0; j < inputs;) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.at += kLineBytes) __builtin_prefetch(ahead.at, 0, 2);
    for (const int64_t end = std::min(j + kAheadInputs, inputs); j < end; ++j, w += w_step)
      AddProducts<T, M, N>(sum, x + j, pixel_step, w);
  }
  if (kAdd) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += *reinterpret_cast<const Vector*>(y + m * y_step + n * kLanes);
  }
  StoreTile<T, M, N>(sum, y, y_step, lanes);
}

// Computes dw[m, :] = sum over pixels of x[pixel][m] * g[pixel][:], for M window values and N vectors of output
// channels, plus `before`, [M][N vectors], unless that is null. What lies behind `before` it fetches for the next tile.
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
  for (int line = M * N; before != nullptr && line < 2 * M * N; ++line)
    __builtin_prefetch(reinterpret_cast<const Vector*>(before) + line, 0, 2);
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * row_step;
    const T* gradient = g + r * g_row_step;
    for (int64_t c = 0; c < columns; ++c, from += pixel_step, gradient += N * kLanes)
      AddProducts<T, M, N>(sum, from, 1, gradient);
  }
  StoreTile<T, M, N>(sum, dw, dw_step, lanes);
}

template <typename T>
using OutputTileFn = decltype(&OutputTile<T, 1, 1>);
template <typename T>
using KernelTileFn = decltype(&KernelTile<T, 1, 1>);

template <typename T, int... M>
OutputTileFn<T> OutputTileOf(int rows, int vectors, std::integer_sequence<int, M...>) {
  static constexpr OutputTileFn<T> table[2][sizeof...(M)] = {{OutputTile<T, M + 1, 1>...},
                                                               {OutputTile<T, M + 1, 2>...}};
  return table[vectors - 1][rows - 1];
}

template <typename T, bool kAdd, int... M>
auto PixelTileOf(int rows, int vectors, std::integer_sequence<int, M...>) {
  static constexpr decltype(&PixelTile<T, 1, 1, kAdd>) table[2][sizeof...(M)] = {{PixelTile<T, M + 1, 1, kAdd>...},
                                                                                  {PixelTile<T, M + 1, 2, kAdd>...}};
  return table[vectors - 1][rows - 1];
}

template <typename T, int... M>
KernelTileFn<T> KernelTileOf(int rows, int vectors, std::integer_sequence<int, M...>) {
  static constexpr KernelTileFn<T> table[2][sizeof...(M)] = {{KernelTile<T, M + 1, 1>...},
                                                               {KernelTile<T, M + 1, 2>...}};
  return table[vectors - 1][rows - 1];
}

constexpr auto kTiles = std::make_integer_sequence<int, kTileRows>{};

// Divides `count` into the fewest tiles, all of nearly the same size, and calls tile(begin, size) for each.
template <typename F>
void ForTiles(int64_t count, F tile) {
  const int64_t tiles = DivideUp(count, kTileRows);
  for (int64_t i = 0, begin = 0; i < tiles; ++i) {
    const int64_t end = count * (i + 1) / tiles;
    tile(begin, static_cast<int>(end - begin));
    begin = end;
  }
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_TILES_H_
