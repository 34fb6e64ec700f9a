// Convolutions of a block by products of bfloat16 values, which are summed in float32: by AMX's tiles, by AVX512-BF16,
// or, for tests, in plain C++. Weights are as ../bfloat16.py's `pack` lays them out: for every 16 outputs (or the rest)
// the taps, of these pairs of inputs, of these the outputs, two values each.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_BFLOAT16_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_BFLOAT16_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "input_rows.h"
#include "sizes.h"
#include "team.h"
#include "tiles.h"

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define DENSENET_JAX_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace densenet_jax {

typedef uint16_t Bfloat16;

enum Products : int64_t { kPortable = 0, kAvx512 = 1, kAmx = 2 };

// Returns the fastest products that this process may use; Linux gives AMX's registers on request.
inline int64_t FastestProducts() {
#ifdef DENSENET_JAX_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool has_tiles = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  if (has_tiles) return kAmx;
#endif
#ifdef __AVX512BF16__
  return kAvx512;
#else
  return kPortable;
#endif
}

constexpr int64_t kTile = 16;             // pixels and outputs of a tile of sums
constexpr int64_t kTileInputs = 2 * kTile;  // that one product of tiles sums over
constexpr int64_t kRowBlock = 2 * kTile;  // pixels and outputs that are computed together
constexpr int64_t kMostTaps = 9;

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

// Writes the mean of relu(scale * x + bias) over `lines` x `lines` pixels (1 or 2; pixels are source.step values apart,
// lines line_step) in bfloat16, and zeros up to `padded` channels.
template <int kLines>
void RoundPixel(const Source<float>& source, int64_t line_step, int64_t channels, int64_t padded, Bfloat16* to) {
  int64_t c = 0;
#ifdef __AVX512BF16__
  const __m512 zero = _mm512_setzero_ps(), quarter = _mm512_set1_ps(0.25f);
  const auto part = [&](int64_t at, __mmask16 mask) {
    const __m512 scale = _mm512_maskz_loadu_ps(mask, source.scale + at);
    const __m512 bias = _mm512_maskz_loadu_ps(mask, source.bias + at);
    __m512 sum = zero;
#pragma GCC unroll 2
    for (int line = 0; line < kLines; ++line)
#pragma GCC unroll 2
      for (int column = 0; column < kLines; ++column) {
        const float* x = source.x + line * line_step + column * source.step + at;
        const __m512 value = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x), scale, bias);
        sum = _mm512_add_ps(sum, _mm512_max_ps(value, zero));
      }
    return kLines == 1 ? sum : _mm512_mul_ps(sum, quarter);
  };
  for (; c + 32 <= channels; c += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(part(c + 16, 0xffff), part(c, 0xffff));
    std::memcpy(to + c, &both, sizeof(both));
  }
  if (c < channels) {
    const auto mask = [&](int64_t left) {
      return static_cast<__mmask16>((1u << std::clamp<int64_t>(left, 0, 16)) - 1);
    };
    const __m512bh both = _mm512_cvtne2ps_pbh(part(c + 16, mask(channels - c - 16)), part(c, mask(channels - c)));
    alignas(64) Bfloat16 values[32];
    std::memcpy(values, &both, sizeof(both));
    std::copy_n(values, channels - c, to + c);
    c = channels;
  }
#endif
  for (; c < channels; ++c) {
    float sum = 0;
    for (int line = 0; line < kLines; ++line)
      for (int column = 0; column < kLines; ++column) {
        const float value = source.x[line * line_step + column * source.step + c] * source.scale[c] + source.bias[c];
        sum += value > 0 ? value : 0;
      }
    to[c] = RoundToBfloat16(kLines == 1 ? sum : sum * 0.25f);
  }
  std::fill(to + channels, to + padded, Bfloat16{0});
}

// One convolution's weights, and where each tap reads its inputs.
struct Bfloat16Weights {
  const Bfloat16 *packed, *ends;  // ends: what is left of a tap's inputs behind whole tiles, with zeros behind
  int64_t channels, outputs, taps;
  int64_t offsets[kMostTaps];  // of each tap's inputs from the first's

  int64_t lanes(int64_t chunk) const { return std::min(kTile, outputs - chunk * kTile); }
  const Bfloat16* Of(int64_t chunk, int64_t tap) const {
    return packed + (chunk * kTile * taps + tap * lanes(chunk)) * channels;
  }
  const Bfloat16* End(int64_t chunk, int64_t tap) const {
    return ends + (chunk * taps + tap) * kTileInputs * kTile;
  }
  int64_t chunks() const { return DivideUp(outputs, kTile); }
};

// Fills `ends` for the tiles of AMX.
inline void CopyEnds(const Bfloat16Weights& w, Bfloat16* ends) {
  const int64_t whole = w.channels / kTileInputs * kTileInputs, left = w.channels - whole;
  for (int64_t chunk = 0; chunk < w.chunks(); ++chunk)
    for (int64_t tap = 0; tap < w.taps; ++tap, ends += kTileInputs * kTile) {
      const int64_t lanes = w.lanes(chunk);
      std::copy_n(w.Of(chunk, tap) + whole * lanes, left * lanes, ends);
      std::fill(ends + left * lanes, ends + kTileInputs * kTile, Bfloat16{0});
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

template <int M, int N>
__attribute__((noinline)) void MultiplyByTiles(const Bfloat16Weights& w, const Bfloat16* x, int64_t step,
                                               int64_t chunk, float* sums, int64_t sums_step) {
  asm volatile("" ::: "memory");  // tile loads don't say that they read memory
  const int64_t whole = w.channels / kTileInputs, row = step * sizeof(Bfloat16);
  const int64_t lanes[2] = {w.lanes(chunk), N == 2 ? w.lanes(chunk + 1) : 0};
  _tile_zero(0);
  if constexpr (N == 2) _tile_zero(1);
  if constexpr (M == 2) _tile_zero(2);
  if constexpr (M == 2 && N == 2) _tile_zero(3);
  const auto multiply = [&](const Bfloat16* from, const Bfloat16* first, const Bfloat16* second) {
    _tile_loadd(6, first, lanes[0] * 4);
    _tile_loadd(4, from, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (M == 2) {
      _tile_loadd(5, from + kTile * step, row);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (N == 2) {
      _tile_loadd(7, second, lanes[1] * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
  };
  for (int64_t tap = 0; tap < w.taps; ++tap) {
    const Bfloat16 *from = x + w.offsets[tap], *first = w.Of(chunk, tap);
    const Bfloat16* second = N == 2 ? w.Of(chunk + 1, tap) : first;
    for (int64_t k = 0; k < whole; ++k) {
      multiply(from, first, second);
      from += kTileInputs, first += kTileInputs * lanes[0], second += kTileInputs * lanes[1];
    }
    if (w.channels % kTileInputs) multiply(from, w.End(chunk, tap), N == 2 ? w.End(chunk + 1, tap) : nullptr);
  }
  const int64_t bytes = sums_step * sizeof(float);
  _tile_stored(0, sums, bytes);
  if constexpr (N == 2) _tile_stored(1, sums + kTile, bytes);
  if constexpr (M == 2) _tile_stored(2, sums + kTile * sums_step, bytes);
  if constexpr (M == 2 && N == 2) _tile_stored(3, sums + kTile * sums_step + kTile, bytes);
}
#endif

#ifdef __AVX512BF16__
// Computes 8 pixels by 16 N outputs.
template <int N>
void MultiplyByVectors(const Bfloat16Weights& w, const Bfloat16* x, int64_t step, int64_t chunk, float* sums,
                       int64_t sums_step) {
  constexpr int kRows = 8;
  __m512 sum[kRows][N];
  int64_t lanes[N];
  __mmask16 mask[N];
  for (int n = 0; n < N; ++n) lanes[n] = w.lanes(chunk + n), mask[n] = static_cast<__mmask16>((1u << lanes[n]) - 1);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
  for (int64_t tap = 0; tap < w.taps; ++tap) {
    const Bfloat16* from = x + w.offsets[tap];
    const Bfloat16* weights[N];
    for (int n = 0; n < N; ++n) weights[n] = w.Of(chunk + n, tap);
    for (int64_t c = 0; c < w.channels; c += 2) {
      __m512i pairs[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) pairs[n] = _mm512_maskz_loadu_epi32(mask[n], weights[n] + c * lanes[n]);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        int32_t pair;
        std::memcpy(&pair, from + m * step + c, sizeof(pair));
        const __m512i value = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
          sum[m][n] = _mm512_dpbf16_ps(sum[m][n], reinterpret_cast<__m512bh>(value),
                                       reinterpret_cast<__m512bh>(pairs[n]));
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) _mm512_mask_storeu_ps(sums + m * sums_step + n * kTile, mask[n], sum[m][n]);
}
#endif

inline void MultiplyPlainly(const Bfloat16Weights& w, const Bfloat16* x, int64_t step, int64_t chunk, int64_t pixels,
                            float* sums, int64_t sums_step) {
  const int64_t lanes = w.lanes(chunk);
  for (int64_t m = 0; m < pixels; ++m) {
    float* to = sums + m * sums_step;
    std::fill_n(to, lanes, 0.0f);
    for (int64_t tap = 0; tap < w.taps; ++tap) {
      const Bfloat16 *from = x + w.offsets[tap] + m * step, *weights = w.Of(chunk, tap);
      for (int64_t c = 0; c < w.channels; ++c)
        for (int64_t o = 0; o < lanes; ++o) to[o] += Widen(from[c]) * Widen(weights[(c / 2 * lanes + o) * 2 + c % 2]);
    }
  }
}

// Computes sums[m][o] of up to 32 pixels and of the outputs of one or two chunks. x has whole tiles of pixels, and may
// hold anything behind `pixels`, as sums then do.
inline void MultiplyBlock(int64_t products, const Bfloat16Weights& w, const Bfloat16* x, int64_t step, int64_t pixels,
                          int64_t chunk, int64_t count, float* sums, int64_t sums_step) {
#ifdef DENSENET_JAX_AMX
  if (products == kAmx) {
    const bool high = pixels > kTile, wide = count > 1;
    const auto multiply = high ? (wide ? MultiplyByTiles<2, 2> : MultiplyByTiles<2, 1>)
                               : (wide ? MultiplyByTiles<1, 2> : MultiplyByTiles<1, 1>);
    return multiply(w, x, step, chunk, sums, sums_step);
  }
#endif
#ifdef __AVX512BF16__
  if (products == kAvx512) {
    for (int64_t m = 0; m < pixels; m += 8)
      (count > 1 ? MultiplyByVectors<2> : MultiplyByVectors<1>)(w, x + m * step, step, chunk, sums + m * sums_step,
                                                                 sums_step);
    return;
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

// Where a step's outputs go: to y[pixel * step + output], the first `added` are added to total[...] instead.
struct Outputs {
  float *y, *total;
  int64_t step, added;

  void Put(const float* sums, int64_t pixel, int64_t first, int64_t lanes) const {
    if (lanes == kRowBlock && first >= added) {
      std::memcpy(y + pixel * step + first, sums, kRowBlock * sizeof(float));
      return;
    }
    const int64_t split = std::clamp<int64_t>(added - first, 0, lanes);
    float *to = y + pixel * step + first, *sum = total + pixel * step + first;
    for (int64_t o = 0; o < split; ++o) sum[o] += sums[o];
    std::copy(sums + split, sums + lanes, to + split);
  }
};

// A feature map in bfloat16 with a border of zeros, in a slot of the calling thread's memory.
struct Bordered {
  Bfloat16* values;
  int64_t batch, height, width, border, channels, step;  // step: from pixel to pixel

  Bordered(Team& team, const Sizes& s, int slot)
      : batch(s.batch),
        height(s.height + 2 * s.padding),
        width(s.padded_width()),
        border(s.padding),
        channels(s.channels),
        step(RoundUp(channels, kTileInputs)) {
    const int64_t lines = batch * height, line = width * step, tasks = std::min(lines, team.size());
    values = ThreadScratch<Bfloat16>(slot, lines * line + kRowBlock * step);  // tiles may be read behind its end
    team.Run(tasks, [&](int64_t task) {
      std::fill(values + lines * task / tasks * line, values + lines * (task + 1) / tasks * line, Bfloat16{0});
    });
  }
  Bordered(const Bordered&) = delete;

  bool IsOf(const Sizes& s) const {
    return s.batch == batch && s.height + 2 * s.padding == height && s.padded_width() == width &&
           s.padding == border && s.channels == channels;
  }
  Bfloat16* At(int64_t image, int64_t y, int64_t x) const {
    return values + ((image * height + y + border) * width + x + border) * step;
  }
};

// Writes relu(scale * x + bias) of rows of up to 32 values, x_step apart, to to[row] + first.
inline void RoundRows(const float* x, int64_t x_step, int64_t rows, const float* scale, const float* bias, int64_t lanes,
                      Bfloat16* const* to, int64_t first) {
#ifdef __AVX512BF16__
  if (lanes == 32) {
    const __m512 a = _mm512_loadu_ps(scale), b = _mm512_loadu_ps(scale + 16), zero = _mm512_setzero_ps();
    const __m512 c = _mm512_loadu_ps(bias), d = _mm512_loadu_ps(bias + 16);
    for (int64_t m = 0; m < rows; ++m, x += x_step) {
      const __m512 low = _mm512_max_ps(_mm512_fmadd_ps(_mm512_loadu_ps(x), a, c), zero);
      const __m512 high = _mm512_max_ps(_mm512_fmadd_ps(_mm512_loadu_ps(x + 16), b, d), zero);
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      std::memcpy(to[m] + first, &both, sizeof(both));
    }
    return;
  }
#endif
  for (int64_t m = 0; m < rows; ++m, x += x_step)
    RoundPixel<1>({x, nullptr, nullptr, scale, bias, 0}, 0, lanes, lanes, to[m] + first);
}

// Computes the outputs of up to 32 pixels, whose inputs are x, from chunk to chunk. put(sums, first, lanes) takes rows of
// 32 for all of them; with `run` the pixels are neighbors from that one on, and whole tiles go there directly.
template <typename F>
void MultiplyPixels(int64_t products, const Bfloat16Weights& w, const Bfloat16* x, int64_t step, int64_t pixels,
                    int64_t first_chunk, int64_t last_chunk, const Outputs* run, int64_t pixel, Tiles& tiles, F put) {
  alignas(64) float sums[kRowBlock * kRowBlock];
  for (int64_t chunk = first_chunk; chunk < last_chunk; chunk += 2) {
    const int64_t count = std::min<int64_t>(2, last_chunk - chunk), first = chunk * kTile;
    const int64_t last_lanes = w.lanes(chunk + count - 1), lanes = (count - 1) * kTile + last_lanes;
    tiles.Set(w.lanes(chunk), count > 1 ? last_lanes : kTile);
    if (run != nullptr && first >= run->added && pixels % kTile == 0) {
      MultiplyBlock(products, w, x, step, pixels, chunk, count, run->y + pixel * run->step + first, run->step);
      continue;
    }
    MultiplyBlock(products, w, x, step, pixels, chunk, count, sums, kRowBlock);
    put(sums, first, lanes);
  }
}

constexpr int64_t kBfloat16TaskProducts = 8 * 1000 * 1000;  // worth a task

inline Bfloat16Weights MakeWeights(const Sizes& s, const Bfloat16* packed, int64_t products) {
  Bfloat16Weights w{packed, nullptr, s.channels, s.out_channels, s.kernel_height * s.kernel_width, {}};
  if (products == kAmx && s.channels % kTileInputs) {
    Bfloat16* ends = ThreadScratch<Bfloat16>(1, w.chunks() * w.taps * kTileInputs * kTile);
    CopyEnds(w, ends);
    w.ends = ends;
  }
  return w;
}

// A 1x1 convolution, of every pixel or of the means of 2x2 pixels. Tasks share the pixels, or, where these are few, the
// output channels. With `between` relu(norm(.)) of the outputs goes there instead.
inline void RunBfloat16Pointwise(Team& team, const Sizes& s, const Source<float>& source, bool pooled,
                                 const Bfloat16* packed, const Outputs& to, int64_t products, const Bordered* between,
                                 const Source<float>& after) {
  const Bfloat16Weights w = MakeWeights(s, packed, products);
  const int64_t pixels = s.batch * s.out_height * s.out_width, step = RoundUp(s.channels, kTileInputs);
  const int64_t pairs = DivideUp(w.chunks(), 2), blocks = DivideUp(pixels, kRowBlock);
  const int64_t parts = blocks < 2 * team.size() ? std::min(pairs, team.size()) : 1;
  const int64_t cost = pixels * s.channels * s.out_channels;
  const int64_t bands = parts > 1 ? 1 : std::min(blocks, CountTasks(cost, kBfloat16TaskProducts, team.size()));
  team.Run(bands * parts, [&](int64_t task) {
    const int64_t band = task / parts, part = task % parts;
    const int64_t first = 2 * (pairs * part / parts), last = std::min(2 * (pairs * (part + 1) / parts), w.chunks());
    Bfloat16* rows = ThreadScratch<Bfloat16>(0, kRowBlock * step);
    Bfloat16* targets[kRowBlock];
    Tiles tiles(products);
    for (int64_t block = blocks * band / bands; block < blocks * (band + 1) / bands; ++block) {
      const int64_t begin = block * kRowBlock, count = std::min(kRowBlock, pixels - begin);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (begin + i) / s.out_width, x = (begin + i) % s.out_width;
        const int64_t image = row / s.out_height, y = row % s.out_height;
        const Source<float> from = source.AtPixel((image * s.height + y * s.stride) * s.width + x * s.stride);
        (pooled ? RoundPixel<2> : RoundPixel<1>)(from, s.width * from.step, s.channels, step, rows + i * step);
        if (between != nullptr) targets[i] = between->At(image, y, x);
      }
      const auto put = [&](const float* sums, int64_t o, int64_t lanes) {
        if (between != nullptr)
          return RoundRows(sums, kRowBlock, count, after.scale + o, after.bias + o, lanes, targets, o);
        for (int64_t m = 0; m < count; ++m) to.Put(sums + m * kRowBlock, begin + m, o, lanes);
      };
      MultiplyPixels(products, w, rows, step, count, first, last, between == nullptr ? &to : nullptr, begin, tiles, put);
    }
  });
}

// A convolution at stride 1 of a feature map with its border. Windows begin at every pixel of an image's long row,
// borders included; what is computed at the right border is dropped.
inline void RunBfloat16Window(Team& team, const Sizes& s, const Bordered& from, const Bfloat16* packed,
                              const Outputs& to, int64_t products) {
  Bfloat16Weights w = MakeWeights(s, packed, products);
  for (int64_t tap = 0; tap < w.taps; ++tap)
    w.offsets[tap] = (tap / s.kernel_width * from.width + tap % s.kernel_width) * from.step;
  const int64_t pixels = (s.out_height - 1) * from.width + s.out_width, per_image = DivideUp(pixels, kRowBlock);
  const int64_t blocks = per_image * s.batch;
  const int64_t cost = blocks * kRowBlock * w.taps * s.channels * s.out_channels;
  const int64_t tasks = std::min(blocks, CountTasks(cost, kBfloat16TaskProducts, team.size()));
  team.Run(tasks, [&](int64_t task) {
    Tiles tiles(products);
    for (int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks; ++block) {
      const int64_t image = block / per_image, begin = block % per_image * kRowBlock;
      const int64_t count = std::min(kRowBlock, pixels - begin);
      int64_t row = begin / from.width, column = begin % from.width, targets[kRowBlock];
      for (int64_t m = 0; m < count; ++m) {
        targets[m] = column < s.out_width ? (image * s.out_height + row) * s.out_width + column : -1;
        if (++column == from.width) ++row, column = 0;
      }
      const Bfloat16* x = from.values + (image * from.height * from.width + begin) * from.step;
      MultiplyPixels(products, w, x, from.step, count, 0, w.chunks(), nullptr, 0, tiles,
                     [&](const float* sums, int64_t o, int64_t lanes) {
                       for (int64_t m = 0; m < count; ++m)
                         if (targets[m] >= 0) to.Put(sums + m * kRowBlock, targets[m], o, lanes);
                     });
    }
  });
}

// Runs a convolution without groups: 1x1 at any stride, or 3x3 at stride 1.
inline void RunBfloat16(Team& team, const Sizes& s, const Source<float>& source, bool pooled, const Bfloat16* packed,
                        const Outputs& to, int64_t products) {
  if (s.kernel_height == 1)
    return RunBfloat16Pointwise(team, s, source, pooled, packed, to, products, nullptr, source);
  const Bordered rounded(team, s, 2);
  team.Run(s.batch * s.height, [&](int64_t line) {
    Source<float> from = source.AtPixel(line * s.width);
    for (int64_t x = 0; x < s.width; ++x, from.x += from.step)
      RoundPixel<1>(from, 0, s.channels, rounded.step, rounded.At(line / s.height, line % s.height, x));
  });
  RunBfloat16Window(team, s, rounded, packed, to, products);
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_BFLOAT16_H_
