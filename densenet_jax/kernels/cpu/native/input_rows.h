// What a convolution reads: rows of a map as they lie, or normalized and rectified on the way.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "sizes.h"
#include "threads.h"

namespace densenet_jax {

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
inline T Normalized(const Source<T>& source, int64_t c) {
  return kNormalise ? (source.x[c] - source.mean[c]) * source.reciprocal[c] : source.x[c];
}

template <bool kNormalise, typename T>
void RectifyPixels(Source<T> source, int64_t pixels, int64_t channels, T* to) {
  for (int64_t p = 0; p < pixels; ++p, source.x += source.step, to += channels) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const T value = source.scale[c] * Normalized<kNormalise>(source, c) + source.bias[c];
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

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_
