// Convolutions of a block by products of rounded values (products.h). Inputs of products are relu(scale * x + bias), in
// bfloat16, or as multiples from 0 to 255 of a scale that is found in the same call: for each pixel of a 1x1
// convolution, for each image of another, so that no image depends on the others.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_ROUNDED_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_ROUNDED_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "input_rows.h"
#include "products.h"
#include "sizes.h"
#include "team.h"
#include "tiles.h"

namespace densenet_jax {

// Reads relu(scale * x + bias) of a pixel, or its mean over 2x2 pixels (kLines 2), whose lines are line_step apart.
template <int kLines>
struct Pixel {
  const Source<float>& source;
  int64_t line_step;

  float At(int64_t c) const {
    float sum = 0;
    for (int line = 0; line < kLines; ++line)
      for (int column = 0; column < kLines; ++column) {
        const float value = source.x[line * line_step + column * source.step + c] * source.scale[c] + source.bias[c];
        sum += value > 0 ? value : 0;
      }
    return kLines == 1 ? sum : sum * 0.25f;
  }
#ifdef __AVX512BW__
  __m512 Vector(int64_t at, __mmask16 mask) const {
    const __m512 zero = _mm512_setzero_ps(), scale = _mm512_maskz_loadu_ps(mask, source.scale + at);
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
    return kLines == 1 ? sum : _mm512_mul_ps(sum, _mm512_set1_ps(0.25f));
  }
#endif
};

#ifdef __AVX512BW__
// Returns a mask of the first of 32 lanes (or of 16, as __mmask16).
inline __mmask32 FirstLanes(int64_t count) {
  return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(count, 0, 32)) - 1);
}

// Rounds 32 values >= 0 to bfloat16, the first 16 from `low`.
inline __m512i ToBfloat16(__m512 high, __m512 low) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#else
  const auto round = [](__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(round(low)), round(high), 1);
#endif
}

// Rounds 64 values times `inverse` to bytes.
inline __m512i ToBytes(__m512 a, __m512 b, __m512 c, __m512 d, __m512 inverse) {
  const auto round = [&](__m512 value) { return _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)); };
  const __m512i low = _mm512_packs_epi32(round(a), round(b)), high = _mm512_packs_epi32(round(c), round(d));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}
#endif

// The scale of bytes for values up to `most`, and what values are multiplied by.
struct ByteScale {
  float scale, inverse;

  explicit ByteScale(float most)
      : scale(most > 1e-30f && most < 1e30f ? most * (1.0f / 255) : 0), inverse(scale > 0 ? 255 / most : 0) {}
  uint8_t Round(float value) const { return static_cast<uint8_t>(std::nearbyint(value * inverse)); }
};

// Writes the first `channels` values of a pixel, and zeros up to `padded`.
template <int kLines>
void RoundPixel(const Pixel<kLines>& pixel, int64_t channels, int64_t padded, Bfloat16* to) {
  int64_t c = 0;
#ifdef __AVX512BW__
  for (; c + 32 <= channels; c += 32)
    _mm512_storeu_si512(to + c, ToBfloat16(pixel.Vector(c + 16, 0xffff), pixel.Vector(c, 0xffff)));
  if (c < channels) {
    const auto part = [&](int64_t at) { return pixel.Vector(at, static_cast<__mmask16>(FirstLanes(channels - at))); };
    alignas(64) Bfloat16 values[32];
    _mm512_store_si512(values, ToBfloat16(part(c + 16), part(c)));
    std::copy_n(values, channels - c, to + c);
    c = channels;
  }
#endif
  for (; c < channels; ++c) to[c] = RoundToBfloat16(pixel.At(c));
  std::fill(to + channels, to + padded, Bfloat16{0});
}

// Reads the first `channels` values of a pixel, and zeros up to `padded`, a multiple of 64. Returns the largest.
template <int kLines>
float ReadPixel(const Pixel<kLines>& pixel, int64_t channels, int64_t padded, float* values) {
  int64_t c = 0;
#ifdef __AVX512BW__
  __m512 largest = _mm512_setzero_ps();
  const auto add = [&](__mmask16 mask) {
    const __m512 value = pixel.Vector(c, mask);
    _mm512_store_ps(values + c, value);
    largest = _mm512_max_ps(largest, value);
  };
  for (; c + 16 <= channels; c += 16) add(0xffff);
  for (; c < padded; c += 16) add(static_cast<__mmask16>(FirstLanes(channels - c)));
  return _mm512_reduce_max_ps(largest);
#else
  float most = 0;
  for (; c < channels; ++c) most = std::max(most, values[c] = pixel.At(c));
  std::fill(values + channels, values + padded, 0.0f);
  return most;
#endif
}

// Writes `count` values, a multiple of 64, in bytes.
inline void RoundToBytes(const float* values, int64_t count, const ByteScale& own, uint8_t* to) {
#ifdef __AVX512BW__
  const __m512 inverse = _mm512_set1_ps(own.inverse);
  for (int64_t c = 0; c < count; c += 64) {
    const auto part = [&](int64_t at) { return _mm512_load_ps(values + c + at); };
    _mm512_storeu_si512(to + c, ToBytes(part(0), part(16), part(32), part(48), inverse));
  }
#else
  for (int64_t c = 0; c < count; ++c) to[c] = own.Round(values[c]);
#endif
}

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

// A feature map of rounded values with a border of zeros, in a slot of the calling thread's memory.
template <typename V>
struct Bordered {
  V* values;
  int64_t batch, height, width, border, channels, step;  // step: from pixel to pixel

  Bordered(Team& team, const Sizes& s, int slot)
      : batch(s.batch),
        height(s.height + 2 * s.padding),
        width(s.padded_width()),
        border(s.padding),
        channels(s.channels),
        step(RoundUp(channels, kTileInputs<V>)) {
    const int64_t lines = batch * height, line = width * step, tasks = std::min(lines, team.size());
    values = ThreadScratch<V>(slot, lines * line + kRowBlock * step);  // tiles may be read behind its end
    team.Run(tasks, [&](int64_t task) {
      std::fill(values + lines * task / tasks * line, values + lines * (task + 1) / tasks * line, V{0});
    });
  }
  Bordered(const Bordered&) = delete;

  bool IsOf(const Sizes& s) const {
    return s.batch == batch && s.height + 2 * s.padding == height && s.padded_width() == width &&
           s.padding == border && s.channels == channels;
  }
  V* At(int64_t image, int64_t y, int64_t x) const {
    return values + ((image * height + y + border) * width + x + border) * step;
  }
};

// Writes relu(scale * x + bias) of rows of up to 32 values, kRowBlock apart, to to[row] + first; integers x count in
// scales of their row.
template <typename Sum>
void RoundRows(const Sum* x, const float* row_scales, int64_t rows, const float* scale, const float* bias,
               int64_t lanes, Bfloat16* const* to, int64_t first) {
#ifdef __AVX512BW__
  if (lanes == 32) {
    const __m512 a = _mm512_loadu_ps(scale), b = _mm512_loadu_ps(scale + 16), zero = _mm512_setzero_ps();
    const __m512 c = _mm512_loadu_ps(bias), d = _mm512_loadu_ps(bias + 16);
    for (int64_t m = 0; m < rows; ++m, x += kRowBlock) {
      const auto read = [&](int64_t at) {
        if constexpr (std::is_same_v<Sum, float>)
          return _mm512_loadu_ps(x + at);
        else
          return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(x + at)), _mm512_set1_ps(row_scales[m]));
      };
      const __m512 low = _mm512_max_ps(_mm512_fmadd_ps(read(0), a, c), zero);
      const __m512 high = _mm512_max_ps(_mm512_fmadd_ps(read(16), b, d), zero);
      _mm512_storeu_si512(to[m] + first, ToBfloat16(high, low));
    }
    return;
  }
#endif
  for (int64_t m = 0; m < rows; ++m, x += kRowBlock)
    for (int64_t o = 0; o < lanes; ++o) {
      const float one = std::is_same_v<Sum, float> ? 1 : row_scales[m];
      const float value = static_cast<float>(x[o]) * one * scale[o] + bias[o];
      to[m][first + o] = RoundToBfloat16(value > 0 ? value : 0);
    }
}

// Rounds a feature map to bytes, of a scale for each image: scales[image].
inline void RoundImages(Team& team, const Bordered<Bfloat16>& from, const Bordered<uint8_t>& to, float* scales) {
  const int64_t height = from.height - 2 * from.border, width = from.width - 2 * from.border;
  const int64_t lines = from.batch * height, tasks = std::min(lines, 2 * team.size());
  std::vector<Bfloat16> most(lines);
  const auto run = [&](auto of_line) {
    team.Run(tasks, [&](int64_t task) {
      for (int64_t i = lines * task / tasks; i < lines * (task + 1) / tasks; ++i) of_line(i, i / height, i % height);
    });
  };
  run([&](int64_t line, int64_t image, int64_t y) {  // values >= 0 have the order of their bits
    const Bfloat16* x = from.At(image, y, 0);
    Bfloat16 largest = 0;
    for (int64_t i = 0; i < width * from.step; ++i) largest = std::max(largest, x[i]);
    most[line] = largest;
  });
  for (int64_t i = 0; i < from.batch; ++i)
    scales[i] = Widen(*std::max_element(most.begin() + i * height, most.begin() + (i + 1) * height));
  run([&](int64_t, int64_t image, int64_t y) {
    const ByteScale own(scales[image]);
    for (int64_t x = 0; x < width; ++x) {
      const Bfloat16* in = from.At(image, y, x);
      uint8_t* out = to.At(image, y, x);
#ifdef __AVX512BW__
      const __m512 inverse = _mm512_set1_ps(own.inverse);
      for (int64_t c = 0; c < from.channels; c += 64) {
        const auto widen = [](__m256i x) {
          return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
        };
        const __m512i low = _mm512_maskz_loadu_epi16(FirstLanes(from.channels - c), in + c);
        const __m512i high = _mm512_maskz_loadu_epi16(FirstLanes(from.channels - c - 32), in + c + 32);
        const auto half = [&](__m512i both, int which) {
          return widen(which ? _mm512_extracti64x4_epi64(both, 1) : _mm512_castsi512_si256(both));
        };
        _mm512_storeu_si512(out + c, ToBytes(half(low, 0), half(low, 1), half(high, 0), half(high, 1), inverse));
      }
#else
      for (int64_t c = 0; c < from.channels; ++c) out[c] = own.Round(Widen(in[c]));
#endif
    }
  });
  for (int64_t i = 0; i < from.batch; ++i) scales[i] = ByteScale(scales[i]).scale;
}

// Writes sums times the scales of their pixel and of their output.
inline void ScaleSums(const int32_t* sums, int64_t pixels, int64_t lanes, const float* of_pixels,
                      const float* of_outputs, float* to, int64_t step) {
  const auto run = [&](int64_t count) {
    for (int64_t m = 0; m < pixels; ++m, sums += kRowBlock, to += step)
#pragma GCC ivdep
      for (int64_t o = 0; o < count; ++o) to[o] = static_cast<float>(sums[o]) * of_outputs[o] * of_pixels[m];
  };
  lanes == kRowBlock ? run(kRowBlock) : run(lanes);
}

// Computes the outputs of up to 32 pixels, whose inputs are x, from chunk to chunk. put(sums, first, lanes) takes rows
// of 32 for all of them; with `run` the pixels are neighbors from that one on, and whole tiles go there.
template <typename V, typename F>
void MultiplyPixels(int64_t products, const RoundedWeights<V>& w, const V* x, int64_t step, int64_t pixels,
                    int64_t first_chunk, int64_t last_chunk, const Outputs* run, int64_t pixel, Tiles& tiles, F put) {
  alignas(64) typename Kind<V>::Sum sums[kRowBlock * kRowBlock];
  for (int64_t chunk = first_chunk; chunk < last_chunk; chunk += 2) {
    const int64_t count = std::min<int64_t>(2, last_chunk - chunk), first = chunk * kTile;
    const int64_t last_lanes = w.lanes(chunk + count - 1), lanes = (count - 1) * kTile + last_lanes;
    tiles.Set(w.lanes(chunk), count > 1 ? last_lanes : kTile);
    if constexpr (std::is_same_v<V, Bfloat16>) {
      if (run != nullptr && first >= run->added && pixels % kTile == 0) {
        MultiplyBlock(products, w, x, step, pixels, chunk, count, run->y + pixel * run->step + first, run->step);
        continue;
      }
    }
    MultiplyBlock(products, w, x, step, pixels, chunk, count, sums, kRowBlock);
    put(sums, first, lanes);
  }
}

// Calls put(sums) with sums of up to 32 pixels and outputs from `first` on in float32.
template <typename V, typename Sum, typename F>
void PutScaled(const RoundedWeights<V>& w, const Sum* sums, int64_t pixels, const float* of_pixels, int64_t first,
               int64_t lanes, F put) {
  if constexpr (std::is_same_v<Sum, float>) {
    put(sums);
  } else {
    alignas(64) float scaled[kRowBlock * kRowBlock];
    ScaleSums(sums, pixels, lanes, of_pixels, w.scales + first, scaled, kRowBlock);
    put(scaled);
  }
}

constexpr int64_t kPixelsAhead = 4;  // that are read before their scales are needed
constexpr int64_t kRoundedTaskProducts = 8 * 1000 * 1000;  // worth a task

template <typename V>
RoundedWeights<V> MakeWeights(const Sizes& s, const RoundedKernel& kernel) {
  typedef typename Kind<V>::Weight Weight;
  const int64_t taps = s.kernel_height * s.kernel_width;
  const auto packed = static_cast<const Weight*>(kernel.packed);
  RoundedWeights<V> w{packed, nullptr, kernel.scales, s.channels, s.out_channels, taps, {}};
  if (kernel.products == kAmx && s.channels % kTileInputs<V>) {
    Weight* ends = ThreadScratch<Weight>(1, w.chunks() * w.taps * kTileInputs<V> * kTile);
    CopyEnds(w, ends);
    w.ends = ends;
  }
  return w;
}

// A 1x1 convolution, of every pixel or of the means of 2x2 pixels. Tasks share the pixels, or, where these are few, the
// output channels. With `between` relu(norm(.)) of the outputs goes there instead.
template <typename V>
void RunRoundedPointwise(Team& team, const Sizes& s, const Source<float>& source, bool pooled,
                         const RoundedKernel& kernel, const Outputs& to, const Bordered<Bfloat16>* between,
                         const Source<float>& after) {
  constexpr bool kBytes = std::is_same_v<V, uint8_t>;
  const RoundedWeights<V> w = MakeWeights<V>(s, kernel);
  std::vector<float> after_scale;
  if (between != nullptr) after_scale.assign(after.scale, after.scale + s.out_channels);
  if (kBytes)
    for (size_t o = 0; o < after_scale.size(); ++o) after_scale[o] *= w.scales[o];
  const int64_t pixels = s.batch * s.out_height * s.out_width, step = RoundUp(s.channels, kTileInputs<V>);
  const int64_t pairs = DivideUp(w.chunks(), 2), blocks = DivideUp(pixels, kRowBlock);
  const int64_t parts = blocks < 2 * team.size() ? std::min(pairs, team.size()) : 1;
  const int64_t cost = pixels * s.channels * s.out_channels;
  const int64_t bands = parts > 1 ? 1 : std::min(blocks, CountTasks(cost, kRoundedTaskProducts, team.size()));
  team.Run(bands * parts, [&](int64_t task) {
    const int64_t band = task / parts, part = task % parts;
    const int64_t first = 2 * (pairs * part / parts), last = std::min(2 * (pairs * (part + 1) / parts), w.chunks());
    V* rows = ThreadScratch<V>(0, kRowBlock * step);
    float* values = kBytes ? ThreadScratch<float>(1, kPixelsAhead * step) : nullptr;
    Bfloat16* targets[kRowBlock];
    float scales[kRowBlock];  // of bytes; the largest values at first
    Tiles tiles(kernel.products);
    for (int64_t block = blocks * band / bands; block < blocks * (band + 1) / bands; ++block) {
      const int64_t begin = block * kRowBlock, count = std::min(kRowBlock, pixels - begin);
      kernel.PrefetchNext(band, bands, team.size(), block - blocks * band / bands, DivideUp(blocks, bands));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (begin + i) / s.out_width, x = (begin + i) % s.out_width;
        const int64_t image = row / s.out_height, y = row % s.out_height;
        const Source<float> from = source.AtPixel((image * s.height + y * s.stride) * s.width + x * s.stride);
        if (between != nullptr) targets[i] = between->At(image, y, x);
        const auto read = [&](const auto& pixel) {
          if constexpr (kBytes)
            scales[i] = ReadPixel(pixel, s.channels, step, values + i % kPixelsAhead * step);
          else
            RoundPixel(pixel, s.channels, step, rows + i * step);
        };
        pooled ? read(Pixel<2>{from, s.width * from.step}) : read(Pixel<1>{from, 0});
        if (!kBytes || (i + 1 < count && (i + 1) % kPixelsAhead != 0)) continue;
        for (int64_t k = i / kPixelsAhead * kPixelsAhead; k <= i; ++k) {
          const ByteScale own(scales[k]);
          RoundToBytes(values + k % kPixelsAhead * step, step, own, reinterpret_cast<uint8_t*>(rows + k * step));
          scales[k] = own.scale;
        }
      }
      const auto put = [&](const auto* sums, int64_t o, int64_t lanes) {
        if (between != nullptr)
          return RoundRows(sums, scales, count, after_scale.data() + o, after.bias + o, lanes, targets, o);
        PutScaled(w, sums, count, scales, o, lanes, [&](const float* sums) {
          for (int64_t m = 0; m < count; ++m) to.Put(sums + m * kRowBlock, begin + m, o, lanes);
        });
      };
      MultiplyPixels(kernel.products, w, rows, step, count, first, last, between == nullptr ? &to : nullptr, begin,
                     tiles, put);
    }
  });
}

// A convolution at stride 1 of a feature map with its border. Windows begin at every pixel of an image's long row,
// borders included; what is computed at the right border is dropped. scales: of each image's bytes.
template <typename V>
void RunRoundedWindow(Team& team, const Sizes& s, const Bordered<V>& from, const float* scales,
                      const RoundedKernel& kernel, const Outputs& to) {
  RoundedWeights<V> w = MakeWeights<V>(s, kernel);
  for (int64_t tap = 0; tap < w.taps; ++tap)
    w.offsets[tap] = (tap / s.kernel_width * from.width + tap % s.kernel_width) * from.step;
  const int64_t pixels = (s.out_height - 1) * from.width + s.out_width, per_image = DivideUp(pixels, kRowBlock);
  const int64_t blocks = per_image * s.batch;
  const int64_t cost = blocks * kRowBlock * w.taps * s.channels * s.out_channels;
  const int64_t tasks = std::min(blocks, CountTasks(cost, kRoundedTaskProducts, team.size()));
  team.Run(tasks, [&](int64_t task) {
    Tiles tiles(kernel.products);
    float of_pixels[kRowBlock];
    for (int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks; ++block) {
      kernel.PrefetchNext(task, tasks, team.size(), block - blocks * task / tasks, DivideUp(blocks, tasks));
      const int64_t image = block / per_image, begin = block % per_image * kRowBlock;
      const int64_t count = std::min(kRowBlock, pixels - begin);
      int64_t row = begin / from.width, column = begin % from.width, targets[kRowBlock];
      for (int64_t m = 0; m < count; ++m) {
        targets[m] = column < s.out_width ? (image * s.out_height + row) * s.out_width + column : -1;
        if (++column == from.width) ++row, column = 0;
      }
      if (scales != nullptr) std::fill_n(of_pixels, kRowBlock, scales[image]);
      const V* x = from.values + (image * from.height * from.width + begin) * from.step;
      const auto put = [&](const auto* sums, int64_t o, int64_t lanes) {
        PutScaled(w, sums, count, of_pixels, o, lanes, [&](const float* sums) {
          for (int64_t m = 0; m < count; ++m)
            if (targets[m] >= 0) to.Put(sums + m * kRowBlock, targets[m], o, lanes);
        });
      };
      MultiplyPixels(kernel.products, w, x, from.step, count, 0, w.chunks(), nullptr, 0, tiles, put);
    }
  });
}

// Convolutions of rounded values, one after another. Feature maps between two of a bottleneck are kept for the next.
class RoundedConvolutions {
 public:
  explicit RoundedConvolutions(Team& team) : team_(team) {}

  // Runs a convolution without groups: 1x1 at any stride, or 3x3 at stride 1.
  void Run(const Sizes& s, const Source<float>& source, bool pooled, const RoundedKernel& kernel, const Outputs& to) {
    if (s.kernel_height == 1) return RunPointwise(s, source, pooled, kernel, to, nullptr, source);
    const Bordered<Bfloat16>& rounded = Get(between_, s, 3);
    team_.Run(s.batch * s.height, [&](int64_t line) {
      Source<float> from = source.AtPixel(line * s.width);
      for (int64_t x = 0; x < s.width; ++x, from.x += from.step)
        RoundPixel(Pixel<1>{from, 0}, s.channels, rounded.step, rounded.At(line / s.height, line % s.height, x));
    });
    RunWindow(s, kernel, to);
  }

  // Runs a 1x1 convolution and then, on relu(norm(.)) of its outputs, one of another size.
  void RunBottleneck(const Sizes& first, const Source<float>& source, bool pooled, const RoundedKernel& kernel,
                     const Sizes& second, const Source<float>& after, const RoundedKernel& next, const Outputs& to) {
    RunPointwise(first, source, pooled, kernel, {}, &Get(between_, second, 3), after);
    RunWindow(second, next, to);
  }

 private:
  template <typename V>
  const Bordered<V>& Get(std::unique_ptr<Bordered<V>>& kept, const Sizes& s, int slot) {
    if (kept == nullptr || !kept->IsOf(s)) kept = std::make_unique<Bordered<V>>(team_, s, slot);
    return *kept;
  }
  void RunPointwise(const Sizes& s, const Source<float>& source, bool pooled, const RoundedKernel& kernel,
                    const Outputs& to, const Bordered<Bfloat16>* between, const Source<float>& after) {
    const auto run = kernel.scales ? RunRoundedPointwise<uint8_t> : RunRoundedPointwise<Bfloat16>;
    run(team_, s, source, pooled, kernel, to, between, after);
  }
  void RunWindow(const Sizes& s, const RoundedKernel& kernel, const Outputs& to) {
    if (kernel.scales == nullptr) return RunRoundedWindow(team_, s, *between_, nullptr, kernel, to);
    const Bordered<uint8_t>& bytes = Get(bytes_, s, 3);
    std::vector<float> scales(s.batch);
    RoundImages(team_, *between_, bytes, scales.data());
    RunRoundedWindow(team_, s, bytes, scales.data(), kernel, to);
  }

  Team& team_;
  std::unique_ptr<Bordered<Bfloat16>> between_;
  std::unique_ptr<Bordered<uint8_t>> bytes_;
};

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_ROUNDED_H_
