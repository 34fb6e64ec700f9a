// Input rows of a convolution: read in place, or copied with norm and ReLU applied.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "sizes.h"
#include "threads.h"

namespace densenet_jax {

// A convolution's input: relu(scale * x_hat + bias) of the first channels of x, whose pixels are `step` values apart.
// x_hat is (x - mean) * rstd, or x if mean is null; if scale is null, the input is x itself.
template <typename T>
struct Source {
  const T *x, *mean, *rstd, *scale, *bias;
  int64_t step;

  Source From(int64_t channel) const {
    const auto at = [&](const T* p) { return p == nullptr ? p : p + channel; };
    return {x + channel, at(mean), at(rstd), at(scale), at(bias), step};
  }
  Source AtPixel(int64_t pixel) const { return {x + pixel * step, mean, rstd, scale, bias, step}; }
};

template <bool kNormalize, typename T>
inline T Normalized(const Source<T>& source, int64_t c) {
  return kNormalize ? (source.x[c] - source.mean[c]) * source.rstd[c] : source.x[c];
}

template <bool kNormalize, typename T>
void ApplyNormRelu(Source<T> source, int64_t pixels, int64_t channels, T* to) {
  for (int64_t p = 0; p < pixels; ++p, source.x += source.step, to += channels) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const T value = source.scale[c] * Normalized<kNormalize>(source, c) + source.bias[c];
      to[c] = value > T{0} ? value : T{0};
    }
  }
}

// Copies one or two whole vectors of each pixel.
template <typename T>
void CopyVectors(const T* from, int64_t step, int64_t pixels, int64_t channels, T* to) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  for (int64_t p = 0; p < pixels; ++p, from += step, to += channels) {
    *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
    if (channels > kLanes) *reinterpret_cast<Vector*>(to + kLanes) = *reinterpret_cast<const Vector*>(from + kLanes);
  }
}

template <typename T>
void CopyPixels(const Source<T>& source, int64_t pixels, int64_t channels, T* to) {
  constexpr int kLanes = Lanes<T>::kCount;
  if (source.scale == nullptr && (channels == kLanes || channels == 2 * kLanes) && source.step != channels) {
    CopyVectors(source.x, source.step, pixels, channels, to);
  } else if (source.scale == nullptr) {
    const bool whole = source.step == channels;
    const int64_t runs = whole ? 1 : pixels, run = whole ? pixels * channels : channels;
    for (int64_t i = 0; i < runs; ++i) std::memcpy(to + i * run, source.x + i * source.step, run * sizeof(T));
  } else if (source.mean == nullptr) {
    ApplyNormRelu<false>(source, pixels, channels, to);
  } else {
    ApplyNormRelu<true>(source, pixels, channels, to);
  }
}

// Returns the input rows of output rows [begin, end) of an image, borders included; the last row may be shorter.
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
    CopyPixels(from, most, s.channels, to);
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
    CopyPixels(source.AtPixel(pixel + r * s.width), s.width, s.channels, to + border);
    std::fill(to + line - border, to + line, T{0});
  }
  return rows;
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_
