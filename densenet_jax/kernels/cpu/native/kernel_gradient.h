// Gradients of convolution kernels.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_KERNEL_GRADIENT_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_KERNEL_GRADIENT_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "input_rows.h"
#include "sizes.h"
#include "threads.h"
#include "tiles.h"
#include "weights.h"

namespace densenet_jax {

constexpr int64_t kPixelsWorthASum = 2048;  // from this many on, adding up two partial sums costs little

// Copies `channels` channels of a gradient's pixels from (pixel, channel) on, padded with zeros to `width`.
template <typename T>
const T* WholeVectors(const Source<T>& gradient, int64_t pixel, int64_t channel, int64_t pixels, int64_t channels,
                      int64_t width) {
  const auto [g, step] = gradient.At(pixel, channel);
  T* to = ThreadScratch<T>(1, pixels * width);
  CopyVectors(g, step, pixels, channels, to, width);
  return to;
}

// Division of a kernel's gradient into tasks: each has a part of the columns, in chunks, and sums over a slice of the
// bands.
struct Shares {
  int64_t parts, slices;

  Shares(int64_t threads, int64_t chunks, int64_t pixels, int64_t bands) {
    slices = std::clamp<int64_t>(pixels / kPixelsWorthASum, 1, threads);
    parts = std::max<int64_t>(1, std::min(DivideUp(threads, slices), chunks));
    slices = std::min(DivideUp(threads, parts), bands);
  }
};

// Computes the kernel's gradient of `blocks` convolutions of sizes s, whose channels are side by side, each of
// `together` groups; a block's products between different groups are dropped. g is the output's gradient; no tile's
// channels may be of two arrays.
template <typename T>
void KernelGradient(ffi::ThreadPool& pool, Sizes s, int64_t blocks, int64_t together, const Source<T>& source,
                    const Source<T>& g, T* dw) {
  const int64_t window = s.kernel_height * s.run(), pixels = s.batch * s.out_height * s.out_width;
  const int64_t chunks = Chunk<T>::Count(s.out_channels);
  const bool pointwise = s.pointwise();
  if (pointwise) s = AsLines(s, sizeof(T), 1, kSummedPixelBytes);
  const Bands bands(s, sizeof(T), 1);
  const int64_t row_step = s.padded_width() * s.channels, pixel_step = s.stride * s.channels;
  // Each slice has a sum of its own, so that the result does not depend on the threads.
  const Shares shares(DivideUp(pool.num_threads(), blocks), chunks, pixels, bands.count);
  const int64_t slices = shares.slices, g_step = blocks * s.out_channels;
  const bool whole = blocks == 1 && together == 1 && slices == 1;  // the last band's sums are the result
  auto sums = Allocate<T>(blocks * slices * chunks * window * Chunk<T>::kMost);
  const auto sums_of = [&](int64_t block, int64_t slice, int64_t chunk) {
    return sums.get() + ((block * slices + slice) * chunks + chunk) * window * Chunk<T>::kMost;
  };
  ParallelFor(pool, blocks * slices * shares.parts, [&](int64_t task) {
    const int64_t part = task % shares.parts, slice = task / shares.parts % slices;
    const int64_t block = task / shares.parts / slices;
    const Source<T> from = source.From(block * s.channels);
    const int64_t first_band = bands.count * slice / slices, end_band = bands.count * (slice + 1) / slices;
    for (int64_t band = first_band; band < end_band; ++band) {
      const int64_t image = band / bands.per_image, begin = band % bands.per_image * bands.rows_each;
      const int64_t end = std::min(begin + bands.rows_each, s.out_height);
      const int64_t at = (image * s.out_height + begin) * s.out_width;
      const T* rows = InputRows(s, from, image, begin, end, pixels);
      int64_t lines = end - begin, columns = s.out_width;
      if (pointwise) {
        columns = std::min(lines * columns, pixels - at);
        lines = 1;
      }
      const bool is_result = whole && band == end_band - 1;
      for (int64_t index = chunks * part / shares.parts; index < chunks * (part + 1) / shares.parts; ++index) {
        const Chunk<T> chunk(s.out_channels, index);
        const int64_t width = chunk.width();
        const T* gradients =
            WholeVectors(g, at, block * s.out_channels + chunk.first, lines * columns, chunk.lanes, width);
        T* own = sums_of(block, slice, index);
        for (int64_t r = 0; r < s.kernel_height; ++r) {
          ForTiles(s.run(), [&](int64_t value, int count) {
            const int64_t at_value = r * s.run() + value;
            T* sum = own + at_value * width;
            KernelTileOf<T>(count, chunk.vectors, kTiles)(
                is_result ? dw + at_value * g_step + chunk.first : sum, is_result ? g_step : width,
                band == first_band ? nullptr : sum, rows + r * row_step + value, pixel_step, s.stride * row_step,
                gradients, columns * width, lines, columns, is_result ? chunk.lanes : width);
          });
        }
      }
    }
  });
  if (whole) return;
  const int64_t inputs = s.channels / together, outputs = s.out_channels / together;
  const int64_t rows = s.kernel_height * s.kernel_width * inputs, slice_step = chunks * window * Chunk<T>::kMost;
  const int64_t tasks = std::clamp<int64_t>(rows * g_step / kValuesWorthATask, 1, 4 * pool.num_threads());
  const auto add_slices = [&](const T* from, int64_t count, T* to) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      T total = from[i];
      for (int64_t slice = 1; slice < slices; ++slice) total += from[slice * slice_step + i];
      to[i] = total;
    }
  };
  ParallelFor(pool, tasks, [&](int64_t task) {
    for (int64_t value = rows * task / tasks; value < rows * (task + 1) / tasks; ++value) {
      const int64_t tap = value / inputs, input = value % inputs;
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t o = 0, count; o < s.out_channels; o += count) {
          const int64_t group = o / outputs, row = tap * s.channels + group * inputs + input;
          const Chunk<T> chunk(s.out_channels, o / Chunk<T>::kMost);
          count = std::min((group + 1) * outputs, chunk.first + chunk.lanes) - o;
          add_slices(sums_of(block, 0, o / Chunk<T>::kMost) + row * chunk.width() + o - chunk.first, count,
                     dw + value * g_step + block * s.out_channels + o);
        }
      }
    }
  });
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_KERNEL_GRADIENT_H_
