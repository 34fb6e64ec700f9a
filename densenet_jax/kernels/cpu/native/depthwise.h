// Depthwise 7x7 convolutions at stride 1 that keep the size, and their kernel's gradient, a vector of channels at a time.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_DEPTHWISE_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_DEPTHWISE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "gelu.h"
#include "threads.h"
#include "tiles.h"

namespace densenet_jax {

constexpr int kSide = 7, kReach = kSide / 2, kTaps = kSide * kSide;

struct Images {
  int64_t count, height, width, channels;

  int64_t pixels() const { return count * height * width; }
  int64_t padded_width() const { return width + 2 * kReach; }
  int64_t vectors() const { return DivideUp(channels, kFloats); }
  int64_t lanes(int64_t vector) const { return std::min<int64_t>(kFloats, channels - vector * kFloats); }
};

inline void CopyLanes(float* to, const float* from, int64_t lanes) {
  if (lanes == kFloats) return Store(to, Load(from));
  Floats value{};
  std::memcpy(&value, from, lanes * sizeof(float));
  Store(to, value);
}

// Copies rows [first, first + count) of one vector of channels, with zeros beyond the borders if padding is kReach.
inline void GatherRows(const Images& s, const float* x, int64_t image, int64_t first, int64_t count, int64_t vector,
                       int64_t padding, float* to) {
  const int64_t lanes = s.lanes(vector), line = (s.width + 2 * padding) * kFloats, border = padding * kFloats;
  for (int64_t row = first; row < first + count; ++row, to += line) {
    if (row < 0 || row >= s.height) {
      std::fill(to, to + line, 0.0f);
      continue;
    }
    std::fill(to, to + border, 0.0f);
    const float* from = x + (image * s.height + row) * s.width * s.channels + vector * kFloats;
    float* pixel = to + border;
    for (int64_t c = 0; c < s.width; ++c, from += s.channels, pixel += kFloats) CopyLanes(pixel, from, lanes);
    std::fill(to + line - border, to + line, 0.0f);
  }
}

// Convolves M neighboring pixels of a row; x is at the upper left of the first pixel's window.
template <int M>
void DepthwiseTile(const float* x, int64_t line, const float* w, Floats start, float* y, int64_t step, int64_t lanes) {
  Floats sum[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sum[m] = start;
  for (int r = 0; r < kSide; ++r, x += line, w += kSide * kFloats) {
    Floats weights[kSide];
#pragma GCC unroll 8
    for (int t = 0; t < kSide; ++t) weights[t] = Load(w + t * kFloats);
#pragma GCC unroll 24
    for (int i = 0; i < M + kSide - 1; ++i) {
      const Floats value = Load(x + i * kFloats);
#pragma GCC unroll 8
      for (int t = 0; t < kSide; ++t)
        if (i - t >= 0 && i - t < M) sum[i - t] += value * weights[t];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    if (lanes == kFloats) {
      Store(y + m * step, sum[m]);
    } else {
      std::memcpy(y + m * step, &sum[m], lanes * sizeof(float));
    }
  }
}

using DepthwiseTileFn = decltype(&DepthwiseTile<1>);

template <int... M>
DepthwiseTileFn DepthwiseTileOf(int pixels, std::integer_sequence<int, M...>) {
  static constexpr DepthwiseTileFn table[] = {DepthwiseTile<M + 1>...};
  return table[pixels - 1];
}

// Computes y, x convolved with kernel [7][7][channels] (turned: by half a turn, for gradients of x) plus bias unless
// that is null, and calls finish(first pixel, number of pixels) for each band of rows, while it is in cache.
template <typename Finish>
void Depthwise(ffi::ThreadPool& pool, const Images& s, const float* x, const float* kernel, bool turned,
               const float* bias, float* y, Finish finish) {
  const int64_t line = s.padded_width() * kFloats;
  const int64_t wanted = DivideUp(4 * pool.num_threads(), std::max<int64_t>(s.count, 1));  // bands of an image
  const int64_t most = std::clamp<int64_t>(s.height / std::min(wanted, s.height), 1, 14);  // rows of a band
  const int64_t bands = DivideUp(s.height, most);
  ParallelFor(pool, s.count * bands, [&](int64_t band) {
    const int64_t image = band / bands, begin = band % bands * most;
    const int64_t count = std::min(most, s.height - begin), first = (image * s.height + begin) * s.width;
    float* rows = ThreadScratch<float>(0, (most + 2 * kReach) * line);
    float* weights = ThreadScratch<float>(1, kTaps * kFloats);
    for (int64_t vector = 0; vector < s.vectors(); ++vector) {
      const int64_t lanes = s.lanes(vector), channel = vector * kFloats;
      GatherRows(s, x, image, begin - kReach, count + 2 * kReach, vector, kReach, rows);
      for (int t = 0; t < kTaps; ++t)
        CopyLanes(weights + (turned ? kTaps - 1 - t : t) * kFloats, kernel + t * s.channels + channel, lanes);
      Floats start{};
      if (bias != nullptr) std::memcpy(&start, bias + channel, lanes * sizeof(float));
      for (int64_t row = 0; row < count; ++row) {
        ForTiles(s.width, [&](int64_t column, int pixels) {
          DepthwiseTileOf(pixels, kTiles)(rows + row * line + column * kFloats, line, weights, start,
                                          y + (first + row * s.width + column) * s.channels + channel, s.channels,
                                          lanes);
        });
      }
    }
    finish(first, count * s.width);
  });
}

// Adds x[pixel + tap] * g[pixel], summed over an image, to a kernel's gradient of R rows, [R][7] vectors.
template <int R>
void DepthwiseGradientRows(const Images& s, const float* x, const float* g, float* sums) {
  const int64_t line = s.padded_width() * kFloats;
  Floats sum[R][kSide];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kSide; ++t) sum[r][t] = Load(sums + (r * kSide + t) * kFloats);
  for (int64_t row = 0; row < s.height; ++row, x += line) {
    const float* from = x;
    for (int64_t column = 0; column < s.width; ++column, from += kFloats, g += kFloats) {
      const Floats gradient = Load(g);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < kSide; ++t) sum[r][t] += Load(from + r * line + t * kFloats) * gradient;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kSide; ++t) Store(sums + (r * kSide + t) * kFloats, sum[r][t]);
}

// Computes dw [7][7][channels], the gradient of Depthwise's kernel, from g, that of y. Slices of the images have sums
// of their own, so that the result does not depend on which thread is first.
inline void DepthwiseKernelGradient(ffi::ThreadPool& pool, const Images& s, const float* x, const float* g, float* dw) {
  const int64_t vectors = s.vectors(), line = s.padded_width() * kFloats, own = kTaps * kFloats;
  const int64_t slices = std::clamp<int64_t>(2 * pool.num_threads() / vectors, 1, std::max<int64_t>(s.count, 1));
  auto sums = Allocate<float>(vectors * slices * own);
  ParallelFor(pool, vectors * slices, [&](int64_t task) {
    const int64_t vector = task / slices, slice = task % slices;
    float* sum = sums.get() + task * own;
    float* rows = ThreadScratch<float>(0, (s.height + 2 * kReach) * line);
    float* gradients = ThreadScratch<float>(1, s.height * s.width * kFloats);
    std::fill(sum, sum + own, 0.0f);
    for (int64_t image = s.count * slice / slices; image < s.count * (slice + 1) / slices; ++image) {
      GatherRows(s, x, image, -kReach, s.height + 2 * kReach, vector, kReach, rows);
      GatherRows(s, g, image, 0, s.height, vector, 0, gradients);
      int r = 0;
      for (; r + 2 <= kSide; r += 2) DepthwiseGradientRows<2>(s, rows + r * line, gradients, sum + r * kSide * kFloats);
      DepthwiseGradientRows<1>(s, rows + r * line, gradients, sum + r * kSide * kFloats);
    }
  });
  for (int64_t vector = 0; vector < vectors; ++vector) {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      Floats total{};
      for (int64_t slice = 0; slice < slices; ++slice)
        total += Load(sums.get() + (vector * slices + slice) * own + tap * kFloats);
      std::memcpy(dw + tap * s.channels + vector * kFloats, &total, s.lanes(vector) * sizeof(float));
    }
  }
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_DEPTHWISE_H_
