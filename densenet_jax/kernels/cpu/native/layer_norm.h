// Layer normalization of one pixel's channels.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_LAYER_NORM_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_LAYER_NORM_H_

#include <cmath>
#include <cstdint>

#include "gelu.h"

namespace densenet_jax {

// Sums value(c) over channels, which returns vectors from channel c on for Floats{} and one number for 0.0f.
template <typename F>
inline float SumChannels(int64_t channels, F value) {
  Floats sum{};
  int64_t c = 0;
  for (; c + kFloats <= channels; c += kFloats) sum += value(c, Floats{});
  float total = 0;
  for (int lane = 0; lane < kFloats; ++lane) total += sum[lane];
  for (; c < channels; ++c) total += value(c, 0.0f);
  return total;
}

inline Floats LoadAs(const float* from, Floats) { return Load(from); }
inline float LoadAs(const float* from, float) { return *from; }

struct Statistics {
  float mean, rstd;

  Statistics(const float* x, int64_t channels, float epsilon) {
    const float share = 1.0f / static_cast<float>(channels);
    mean = share * SumChannels(channels, [&](int64_t c, auto zero) { return LoadAs(x + c, zero); });
    const float squares = SumChannels(channels, [&](int64_t c, auto zero) {
      const auto centered = LoadAs(x + c, zero) - mean;
      return centered * centered;
    });
    rstd = 1.0f / std::sqrt(share * squares + epsilon);
  }
};

// Normalizes, scales and shifts; y may be x.
inline void NormalizePixel(const float* x, int64_t channels, float epsilon, const float* scale, const float* shift,
                           float* y) {
  const Statistics statistics(x, channels, epsilon);
  const float mean = statistics.mean, rstd = statistics.rstd;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) y[c] = (x[c] - mean) * rstd * scale[c] + shift[c];
}

// Computes dx, the gradient of NormalizePixel's x, from g, that of y, and adds those of scale, of shift and of x to
// three rows of `channels` sums.
inline void NormalizePixelGradient(const float* x, const float* g, int64_t channels, float epsilon, const float* scale,
                                   float* dx, float* sums) {
  const Statistics statistics(x, channels, epsilon);
  const float mean = statistics.mean, rstd = statistics.rstd, share = 1.0f / static_cast<float>(channels);
  const float mean_g =
      share * SumChannels(channels, [&](int64_t c, auto zero) { return LoadAs(g + c, zero) * LoadAs(scale + c, zero); });
  const float mean_gx = share * SumChannels(channels, [&](int64_t c, auto zero) {
    return LoadAs(g + c, zero) * LoadAs(scale + c, zero) * ((LoadAs(x + c, zero) - mean) * rstd);
  });
  float *dscale = sums, *dshift = sums + channels, *total = sums + 2 * channels;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const float x_hat = (x[c] - mean) * rstd, gradient = (g[c] * scale[c] - mean_g - x_hat * mean_gx) * rstd;
    dx[c] = gradient;
    dscale[c] += g[c] * x_hat;
    dshift[c] += g[c];
    total[c] += gradient;
  }
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_LAYER_NORM_H_
