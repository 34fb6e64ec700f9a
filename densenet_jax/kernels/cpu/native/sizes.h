// Sizes of a convolution, and its division into tasks.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_SIZES_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_SIZES_H_

#include <algorithm>
#include <cstdint>

#include "tiles.h"

namespace densenet_jax {

constexpr int64_t kBandBytes = 192 * 1024;  // of input rows: with the weights, they fit a core's L2 cache
// Of a pointwise convolution's pixels: those for which weights are read once, and those for which the sums of a kernel's
// gradient are read and written once.
constexpr int64_t kPixelBytes = 384 * 1024, kSummedPixelBytes = 640 * 1024;

struct Sizes {
  int64_t batch, height, width, channels;       // of the input
  int64_t out_height, out_width, out_channels;  // of the output
  int64_t kernel_height, kernel_width, stride, padding;

  int64_t run() const { return kernel_width * channels; }
  int64_t padded_width() const { return width + 2 * padding; }
  // Whether each output reads one pixel; then all pixels form one long row, which AsLines cuts.
  bool pointwise() const { return kernel_height == 1 && kernel_width == 1 && padding == 0 && stride == 1; }
};

// Bands of output rows (or, pointwise, of lines of pixels), one a task, whose inputs stay in cache.
struct Bands {
  int64_t rows_each, per_image, count;

  Bands(const Sizes& s, int64_t element_bytes, int64_t threads) {
    const int64_t line = s.padded_width() * std::max(s.channels, s.out_channels) * element_bytes;
    rows_each = std::clamp<int64_t>((kBandBytes / line - s.kernel_height) / s.stride + 1, 1, s.out_height);
    while (rows_each > 1 && DivideUp(s.out_height, rows_each) * s.batch < 8 * threads) rows_each = (rows_each + 1) / 2;
    per_image = DivideUp(s.out_height, rows_each);
    count = per_image * s.batch;
  }
};

// Returns a pointwise convolution's sizes with all pixels in lines of one "image", as many for each thread and nearly
// equal, of about line_bytes at most; the last line may be shorter.
inline Sizes AsLines(Sizes s, int64_t element_bytes, int64_t threads, int64_t line_bytes = kPixelBytes) {
  const int64_t most = line_bytes / (std::max(s.channels, s.out_channels) * element_bytes * kTileRows);
  const int64_t pixels = DivideUp(s.batch * s.height * s.width, threads);  // of a thread
  const int64_t lines = DivideUp(DivideUp(pixels, kTileRows), std::clamp<int64_t>(most, 1, 8));
  const int64_t line = DivideUp(pixels, lines);
  s.out_height = s.height = DivideUp(s.batch * s.height * s.width, line);
  s.out_width = s.width = line;
  s.batch = 1;
  return s;
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_SIZES_H_
