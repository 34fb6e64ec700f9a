// Products of bfloat16 values, summed in float32, and of integers of 8 bits, summed in 32 bits: by AMX's tiles, by
// AVX-512's instructions for them, or, for tests, in plain C++. Weights are as ../bfloat16.py's `lay_out` has them: for
// every 16 outputs (or the rest) the taps, of these groups of inputs of 32 bits, of these the outputs, a group each.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_PRODUCTS_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "threads.h"
#include "tiles.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define DENSENET_JAX_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace densenet_jax {

typedef uint16_t Bfloat16;

// The weights and sums of products with inputs V.
template <typename V>
struct Kind;
template <>
struct Kind<Bfloat16> {
  typedef Bfloat16 Weight;
  typedef float Sum;
#ifdef __AVX512BF16__
  static constexpr bool kHasVectors = true;
#else
  static constexpr bool kHasVectors = false;
#endif
};
template <>
struct Kind<uint8_t> {
  typedef int8_t Weight;
  typedef int32_t Sum;
#ifdef __AVX512VNNI__
  static constexpr bool kHasVectors = true;
#else
  static constexpr bool kHasVectors = false;
#endif
};

enum Products : int64_t { kPortable = 0, kAvx512 = 1, kAmx = 2 };

// Returns the fastest products of V that this process may use; Linux gives AMX's registers on request.
template <typename V>
int64_t FastestProducts() {
#ifdef DENSENET_JAX_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool has_tiles = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  if (has_tiles) return kAmx;
#endif
  return Kind<V>::kHasVectors ? kAvx512 : kPortable;
}

constexpr int64_t kTile = 16;             // pixels and outputs of a tile of sums
constexpr int64_t kRowBlock = 2 * kTile;  // pixels and outputs that are computed together
constexpr int64_t kMostTaps = 9;
template <typename V>
constexpr int64_t kTogether = 4 / sizeof(V);  // inputs of a group
template <typename V>
constexpr int64_t kTileInputs = kTile * kTogether<V>;  // that one product of tiles sums over

inline int64_t RoundUp(int64_t count, int64_t multiple) { return DivideUp(count, multiple) * multiple; }

inline Bfloat16 RoundToBfloat16(float value) {  // to the nearest, of two to the even one
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<Bfloat16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float Widen(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline int32_t Widen(uint8_t value) { return value; }
inline int32_t Widen(int8_t value) { return value; }

// A kernel for products of rounded values, as they are in a call.
struct RoundedKernel {
  const void* packed;   // null: there is none
  const float* scales;  // of each output's integers; null: they are bfloat16 values
  int64_t products;
  int64_t bytes;
  const RoundedKernel* next;  // of the step behind, or null

  // Asks for the next kernel's weights while others are multiplied: in every thread for all of them, a part for each of
  // the blocks in each of its tasks.
  void PrefetchNext(int64_t task, int64_t tasks, int64_t threads, int64_t block, int64_t blocks) const {
    if (next == nullptr || next->packed == nullptr) return;
    const int64_t part = task / threads * blocks + block, parts = DivideUp(tasks, threads) * blocks;
    const auto* from = static_cast<const char*>(next->packed);
    const int64_t end = next->bytes * (part + 1) / parts;
    for (int64_t at = next->bytes * part / parts; at < end; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

// One convolution's weights, and where each tap reads its inputs.
template <typename V>
struct RoundedWeights {
  typedef typename Kind<V>::Weight Value;
  const Value *packed, *ends;  // ends: what is left of a tap's inputs behind whole tiles, with zeros behind
  const float* scales;
  int64_t channels, outputs, taps;
  int64_t offsets[kMostTaps];  // of each tap's inputs from the first's

  int64_t lanes(int64_t chunk) const { return std::min(kTile, outputs - chunk * kTile); }
  const Value* Of(int64_t chunk, int64_t tap) const {
    return packed + (chunk * kTile * taps + tap * lanes(chunk)) * channels;
  }
  const Value* End(int64_t chunk, int64_t tap) const { return ends + (chunk * taps + tap) * kTileInputs<V> * kTile; }
  int64_t chunks() const { return DivideUp(outputs, kTile); }
};

// Fills `ends` for the tiles of AMX.
template <typename V>
void CopyEnds(const RoundedWeights<V>& w, typename Kind<V>::Weight* ends) {
  const int64_t whole = w.channels / kTileInputs<V> * kTileInputs<V>, left = w.channels - whole;
  for (int64_t chunk = 0; chunk < w.chunks(); ++chunk)
    for (int64_t tap = 0; tap < w.taps; ++tap, ends += kTileInputs<V> * kTile) {
      const int64_t lanes = w.lanes(chunk);
      std::copy_n(w.Of(chunk, tap) + whole * lanes, left * lanes, ends);
      std::fill(ends + left * lanes, ends + kTileInputs<V> * kTile, typename Kind<V>::Weight{0});
    }
}

#ifdef DENSENET_JAX_AMX
struct alignas(64) TileConfig {
  uint8_t palette = 1, first_row = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Configures tiles 0 to 3 for sums [2 of pixels][2 of outputs], 4 and 5 for inputs, 6 and 7 for weights.
inline void SetTiles(int64_t first_lanes, int64_t second_lanes) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const int64_t lanes = tile % 2 ? second_lanes : first_lanes;
    config.rows[tile] = kTile;
    config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? 64 : 4 * lanes);
  }
  asm volatile("" : : "r"(&config) : "memory");  // its loading doesn't say that it reads all of it
  _tile_loadconfig(&config);
}

#define DENSENET_JAX_TILE_PRODUCT(sum, x, w)   \
  if constexpr (std::is_same_v<V, Bfloat16>) { \
    _tile_dpbf16ps(sum, x, w);                 \
  } else {                                     \
    _tile_dpbusd(sum, x, w);                   \
  }

template <typename V, int M, int N>
__attribute__((noinline)) void MultiplyByTiles(const RoundedWeights<V>& w, const V* x, int64_t step, int64_t chunk,
                                               typename Kind<V>::Sum* sums, int64_t sums_step) {
  asm volatile("" ::: "memory");  // tile loads don't say that they read memory
  typedef typename Kind<V>::Weight Weight;
  const int64_t whole = w.channels / kTileInputs<V>, row = step * sizeof(V);
  const int64_t lanes[2] = {w.lanes(chunk), N == 2 ? w.lanes(chunk + 1) : 0};
  _tile_zero(0);
  if constexpr (N == 2) _tile_zero(1);
  if constexpr (M == 2) _tile_zero(2);
  if constexpr (M == 2 && N == 2) _tile_zero(3);
  const auto multiply = [&](const V* from, const Weight* first, const Weight* second) {
    _tile_loadd(6, first, lanes[0] * 4);
    _tile_loadd(4, from, row);
    DENSENET_JAX_TILE_PRODUCT(0, 4, 6);
    if constexpr (M == 2) {
      _tile_loadd(5, from + kTile * step, row);
      DENSENET_JAX_TILE_PRODUCT(2, 5, 6);
    }
    if constexpr (N == 2) {
      _tile_loadd(7, second, lanes[1] * 4);
      DENSENET_JAX_TILE_PRODUCT(1, 4, 7);
    }
    if constexpr (M == 2 && N == 2) DENSENET_JAX_TILE_PRODUCT(3, 5, 7);
  };
  for (int64_t tap = 0; tap < w.taps; ++tap) {
    const V* from = x + w.offsets[tap];
    const Weight *first = w.Of(chunk, tap), *second = N == 2 ? w.Of(chunk + 1, tap) : first;
    for (int64_t k = 0; k < whole; ++k) {
      multiply(from, first, second);
      from += kTileInputs<V>, first += kTileInputs<V> * lanes[0], second += kTileInputs<V> * lanes[1];
    }
    if (w.channels % kTileInputs<V>) multiply(from, w.End(chunk, tap), N == 2 ? w.End(chunk + 1, tap) : nullptr);
  }
  const int64_t bytes = sums_step * 4;
  _tile_stored(0, sums, bytes);
  if constexpr (N == 2) _tile_stored(1, sums + kTile, bytes);
  if constexpr (M == 2) _tile_stored(2, sums + kTile * sums_step, bytes);
  if constexpr (M == 2 && N == 2) _tile_stored(3, sums + kTile * sums_step + kTile, bytes);
}
#endif

#ifdef __AVX512BF16__
inline __m512 AddProducts(__m512 sums, __m512i x, __m512i w) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}
#endif
#ifdef __AVX512VNNI__
inline __m512i AddProducts(__m512i sums, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sums, x, w); }
#endif

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
// Computes 8 pixels by 16 N outputs.
template <typename V, int N>
void MultiplyByVectors(const RoundedWeights<V>& w, const V* x, int64_t step, int64_t chunk, typename Kind<V>::Sum* sums,
                       int64_t sums_step) {
  constexpr int kRows = 8;
  typedef std::conditional_t<std::is_same_v<V, Bfloat16>, __m512, __m512i> Vector;
  Vector sum[kRows][N];
  int64_t lanes[N];
  __mmask16 mask[N];
  for (int n = 0; n < N; ++n) lanes[n] = w.lanes(chunk + n), mask[n] = static_cast<__mmask16>((1u << lanes[n]) - 1);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = Vector{};
  for (int64_t tap = 0; tap < w.taps; ++tap) {
    const V* from = x + w.offsets[tap];
    const typename Kind<V>::Weight* weights[N];
    for (int n = 0; n < N; ++n) weights[n] = w.Of(chunk + n, tap);
    for (int64_t c = 0; c < w.channels; c += kTogether<V>) {
      __m512i groups[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) groups[n] = _mm512_maskz_loadu_epi32(mask[n], weights[n] + c * lanes[n]);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        int32_t group;
        std::memcpy(&group, from + m * step + c, sizeof(group));
        const __m512i value = _mm512_set1_epi32(group);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[m][n] = AddProducts(sum[m][n], value, groups[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
      _mm512_mask_storeu_epi32(sums + m * sums_step + n * kTile, mask[n], reinterpret_cast<__m512i>(sum[m][n]));
}
#endif

template <typename V>
void MultiplyPlainly(const RoundedWeights<V>& w, const V* x, int64_t step, int64_t chunk, int64_t pixels,
                     typename Kind<V>::Sum* sums, int64_t sums_step) {
  constexpr int64_t kGroup = kTogether<V>;
  const int64_t lanes = w.lanes(chunk);
  for (int64_t m = 0; m < pixels; ++m) {
    typename Kind<V>::Sum* to = sums + m * sums_step;
    std::fill_n(to, lanes, typename Kind<V>::Sum{0});
    for (int64_t tap = 0; tap < w.taps; ++tap) {
      const V* from = x + w.offsets[tap] + m * step;
      const typename Kind<V>::Weight* weights = w.Of(chunk, tap);
      for (int64_t c = 0; c < w.channels; ++c)
        for (int64_t o = 0; o < lanes; ++o)
          to[o] += Widen(from[c]) * Widen(weights[(c / kGroup * lanes + o) * kGroup + c % kGroup]);
    }
  }
}

// Computes sums[m][o] of up to 32 pixels and of the outputs of one or two chunks. x has whole tiles of pixels, and may
// hold anything behind `pixels`, as sums then do.
template <typename V>
void MultiplyBlock(int64_t products, const RoundedWeights<V>& w, const V* x, int64_t step, int64_t pixels,
                   int64_t chunk, int64_t count, typename Kind<V>::Sum* sums, int64_t sums_step) {
#ifdef DENSENET_JAX_AMX
  if (products == kAmx) {
    const bool high = pixels > kTile, wide = count > 1;
    const auto multiply = high ? (wide ? MultiplyByTiles<V, 2, 2> : MultiplyByTiles<V, 2, 1>)
                               : (wide ? MultiplyByTiles<V, 1, 2> : MultiplyByTiles<V, 1, 1>);
    return multiply(w, x, step, chunk, sums, sums_step);
  }
#endif
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
  if constexpr (Kind<V>::kHasVectors) {
    if (products == kAvx512) {
      const auto multiply = count > 1 ? MultiplyByVectors<V, 2> : MultiplyByVectors<V, 1>;
      for (int64_t m = 0; m < pixels; m += 8) multiply(w, x + m * step, step, chunk, sums + m * sums_step, sums_step);
      return;
    }
  }
#endif
  for (int64_t n = 0; n < count; ++n)
    MultiplyPlainly(w, x, step, chunk + n, pixels, sums + n * kTile, sums_step);
}

// Keeps the tiles' configuration of one task, and gives the registers back at its end.
class Tiles {
 public:
  explicit Tiles(int64_t products) : uses_(products == kAmx) {}
  ~Tiles() {
#ifdef DENSENET_JAX_AMX
    if (uses_) _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;

  void Set(int64_t first_lanes, int64_t second_lanes) {
    if (!uses_ || (first_lanes == first_ && second_lanes == second_)) return;
    first_ = first_lanes, second_ = second_lanes;
#ifdef DENSENET_JAX_AMX
    SetTiles(first_lanes, second_lanes);
#endif
  }

 private:
  const bool uses_;
  int64_t first_ = 0, second_ = 0;
};

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_PRODUCTS_H_
