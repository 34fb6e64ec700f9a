// Input rows of a convolution: read in place, or copied with norm and ReLU applied.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_INPUT_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "sizes.h"
#include "threads.h"

namespace densenet_jax {

// A convolution's input: relu(scale * x_hat + bias) of the first channels of x, whose pixels are `step` values apart.
// x_hat is (x - mean) * rstd, or x if mean is null; if scale is null, the input is x itself. Channels from `split` on are
// those of `other`, x_hat already, unless that is null.
template <typename T>
struct Source {
  const T *x, *mean, *rstd, *scale, *bias;
  int64_t step;
  const T* other = nullptr;
  int64_t other_step = 0, split = 0;

  Source From(int64_t channel) const {
    const auto at = [&](const T* p) { return p == nullptr ? p : p + channel; };
    return {x + channel, at(mean), at(rstd), at(scale), at(bias), step, other, other_step, split};
  }
  Source AtPixel(int64_t pixel) const {
    const T* others = other == nullptr ? other : other + pixel * other_step;
    return {x + pixel * step, mean, rstd, scale, bias, step, others, other_step, split};
  }
  // Returns a channel of a pixel of what is read as it is, and the step to the next pixel.
  std::pair<const T*, int64_t> At(int64_t pixel, int64_t channel) const {
    if (other == nullptr || channel < split) return {x + pixel * step + channel, step};
    return {other + pixel * other_step + channel - split, other_step};
  }
  // Calls run(source, first channel, channels) for each array.
  template <typename F>
  void ForArrays(int64_t channels, F run) const {
    if (other == nullptr) return run(*this, int64_t{0}, channels);
    run(Source{x, mean, rstd, scale, bias, step}, int64_t{0}, split);
    const Source behind = From(split);
    run(Source{other, nullptr, nullptr, behind.scale, behind.bias, other_step}, split, channels - split);
  }
};

// Norm and ReLU of a vector of channels: x_hat, and what the ReLU gets.
template <bool kNormalize, typename T>
struct NormVector {
  using Vector = typename Lanes<T>::Vector;
  Vector mean, rstd, scale, bias;

  NormVector(const Source<T>& source, int64_t channel, int64_t lanes)
      : mean(kNormalize ? LoadLanes(source.mean + channel, lanes) : Vector{}),
        rstd(kNormalize ? LoadLanes(source.rstd + channel, lanes) : Vector{}),
        scale(LoadLanes(source.scale + channel, lanes)),
        bias(LoadLanes(source.bias + channel, lanes)) {}

  Vector Normalize(Vector x) const { return kNormalize ? (x - mean) * rstd : x; }
  Vector Affine(Vector x_hat) const { return scale * x_hat + bias; }
};

template <bool kNormalize, typename T>
void ApplyNormRelu(const Source<T>& source, int64_t pixels, int64_t channels, T* to, int64_t to_step) {
  using Vector = typename Lanes<T>::Vector;
  ForVectors<T>(pixels, channels, [&](int64_t pixel, int64_t count, int64_t channel, int64_t lanes) {
    const NormVector<kNormalize, T> norm(source, channel, lanes);
    const T* x = source.x + pixel * source.step + channel;
    T* own = to + pixel * to_step + channel;
    for (int64_t i = 0; i < count; ++i, x += source.step, own += to_step) {
      const Vector value = norm.Affine(norm.Normalize(LoadLanes(x, lanes)));
      StoreLanes<T>(value > Vector{} ? value : Vector{}, own, lanes);
    }
  });
}

// Copies up to two vectors of each pixel; `to` gets `width` values a pixel, with zeros behind the channels.
template <typename T>
void CopyVectors(const T* from, int64_t step, int64_t pixels, int64_t channels, T* to, int64_t width) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const int64_t first = std::min(channels, kLanes), second = channels - first;
  for (int64_t p = 0; p < pixels; ++p, from += step, to += width) {
    StoreLanes<T>(LoadLanes(from, first), to, std::min(width, kLanes));
    if (second > 0) StoreLanes<T>(LoadLanes(from + kLanes, second), to + kLanes, width - kLanes);
  }
}

template <typename T>
void CopyPixels(const Source<T>& source, int64_t pixels, int64_t channels, T* to) {
  source.ForArrays(channels, [&](const Source<T>& one, int64_t first, int64_t count) {
    if (one.scale != nullptr) {
      const auto apply = one.mean == nullptr ? ApplyNormRelu<false, T> : ApplyNormRelu<true, T>;
      apply(one, pixels, count, to + first, channels);
    } else if (count == channels && one.step == channels) {
      std::memcpy(to, one.x, pixels * channels * sizeof(T));
    } else if (count == channels && count <= 2 * Lanes<T>::kCount) {
      CopyVectors(one.x, one.step, pixels, count, to, count);
    } else {
      for (int64_t i = 0; i < pixels; ++i)
        std::memcpy(to + first + i * channels, one.x + i * one.step, count * sizeof(T));
    }
  });
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
