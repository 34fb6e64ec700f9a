// An image's first convolution, norm, ReLU and 3x3 maximum at stride 2, by products of bfloat16 values. A row of the
// convolution's window is contiguous in an image of few channels, so that it is one pixel's inputs for `MultiplyBlock`.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_STEM_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_STEM_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "products.h"
#include "rounded.h"
#include "sizes.h"
#include "team.h"
#include "tiles.h"

namespace densenet_jax {

constexpr int64_t kRowInputs = kTileInputs<Bfloat16>;  // that a row of the window is padded to

// Lays weights [k][k][c][o] out for taps that are rows of the window, padded with zeros to a tile's inputs.
inline void PackRowsOfWindow(const Sizes& s, const float* kernel, Bfloat16* to) {
  const int64_t run = s.kernel_width * s.channels;
  for (int64_t first = 0; first < s.out_channels; first += kTile) {
    const int64_t lanes = std::min(kTile, s.out_channels - first);
    for (int64_t row = 0; row < s.kernel_height; ++row)
      for (int64_t pair = 0; pair < kTile; ++pair)
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int64_t k = 2 * pair; k < 2 * pair + 2; ++k)
            *to++ = k < run ? RoundToBfloat16(kernel[(row * run + k) * s.out_channels + first + lane]) : Bfloat16{0};
  }
}

// Sets y [pooled rows][pooled columns][outputs] of each image to the maxima of relu(scale * (x * kernel) + bias).
inline void RunStem(Team& team, const Sizes& s, const float* x, const float* kernel, const float* scale,
                    const float* bias, float* y, int64_t products) {
  const int64_t outputs = s.out_channels, height = DivideUp(s.out_height, 2), width = DivideUp(s.out_width, 2);
  const int64_t padded = s.padded_width(), line = padded * s.channels, step = s.stride * s.channels;
  Bfloat16* packed = ThreadScratch<Bfloat16>(1, RoundUp(outputs, kTile) * s.kernel_height * kRowInputs);
  PackRowsOfWindow(s, kernel, packed);
  RoundedWeights<Bfloat16> w{packed, nullptr, nullptr, kRowInputs, outputs, s.kernel_height, {}};
  for (int64_t row = 0; row < s.kernel_height; ++row) w.offsets[row] = row * line;
  const int64_t bands = std::min(height, RoundUp(DivideUp(height, 8), team.size()));
  const int64_t row_values = (s.out_width + 2) * outputs;  // of the convolution, with a border on both sides
  team.Run(s.batch * bands, [&](int64_t task) {
    const int64_t image = task / bands, begin = height * (task % bands) / bands;
    const int64_t end = height * (task % bands + 1) / bands;
    const int64_t first = 2 * begin - 1, count = 2 * (end - begin) + 1;  // rows of the convolution
    const int64_t top = first * s.stride - s.padding, rows = (count - 1) * s.stride + s.kernel_height;
    Bfloat16* in = ThreadScratch<Bfloat16>(0, rows * line + kRowBlock * step + kRowInputs);
    for (int64_t r = 0; r < rows; ++r) {
      Bfloat16* to = in + r * line;
      std::fill_n(to, line, Bfloat16{0});
      if (top + r < 0 || top + r >= s.height) continue;
      const float* from = x + (image * s.height + top + r) * s.width * s.channels;
      to += s.padding * s.channels;
      for (int64_t i = 0; i < s.width * s.channels; ++i) to[i] = RoundToBfloat16(from[i]);
    }
    std::fill_n(in + rows * line, kRowBlock * step + kRowInputs, Bfloat16{0});
    float* out = ThreadScratch<float>(0, count * row_values);
    Tiles tiles(products);
    for (int64_t r = 0; r < count; ++r) {
      float* row = out + r * row_values + outputs;
      std::fill_n(row - outputs, outputs, 0.0f);
      std::fill_n(row + s.out_width * outputs, outputs, 0.0f);
      if (first + r < 0 || first + r >= s.out_height) {
        std::fill_n(row, s.out_width * outputs, 0.0f);
        continue;
      }
      for (int64_t column = 0; column < s.out_width; column += kRowBlock) {
        const int64_t pixels = std::min(kRowBlock, s.out_width - column);
        const auto put = [&](const float* sums, int64_t o, int64_t lanes) {
          for (int64_t m = 0; m < pixels; ++m) {
            float* to = row + (column + m) * outputs + o;
#pragma GCC ivdep
            for (int64_t i = 0; i < lanes; ++i) {
              const float value = sums[m * kRowBlock + i] * scale[o + i] + bias[o + i];
              to[i] = value > 0 ? value : 0;
            }
          }
        };
        MultiplyPixels(products, w, in + r * s.stride * line + column * step, step, pixels, 0, w.chunks(), nullptr, 0,
                       tiles, put);
      }
    }
    for (int64_t p = begin; p < end; ++p)
      for (int64_t q = 0; q < width; ++q) {
        const float* corner = out + 2 * (p - begin) * row_values + 2 * q * outputs;
        float* to = y + ((image * height + p) * width + q) * outputs;
#pragma GCC ivdep
        for (int64_t o = 0; o < outputs; ++o) {
          float most = 0;
          for (int64_t r = 0; r < 3; ++r)
            for (int64_t c = 0; c < 3; ++c) most = std::max(most, corner[r * row_values + c * outputs + o]);
          to[o] = most;
        }
      }
  });
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_STEM_H_
