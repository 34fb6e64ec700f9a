// Two products of matrices, one after the other, whose wide result in between stays in a core's cache.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_BOTTLENECK_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_BOTTLENECK_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"
#include "tiles.h"
#include "weights.h"

namespace densenet_jax {

using FloatChunk = Chunk<float>;

constexpr int64_t kBlockBytes = 1 << 20;  // of a block of pixels and its bottleneck values: half of a core's L2 cache
// With fewer pixels a thread, threads share the weights' columns instead of the pixels, and read each weight once.
constexpr int64_t kPixelsWorthABlock = 128;
constexpr int64_t kPixelsOfAPanel = 128;  // of a sum over pixels: a chunk of their columns stays in the L1 cache

// Weights [inputs][outputs]; transposed, they lie in memory as [outputs][inputs].
struct Matrix {
  const float* w;
  int64_t inputs, outputs;
  bool transposed;
};

// Copies a chunk of columns to [inputs][chunk.width()], filled up with zeros.
inline void PackPanel(const Matrix& matrix, const FloatChunk& chunk, float* to) {
  constexpr int kLanes = Lanes<float>::kCount;
  const int64_t width = chunk.width(), inputs = matrix.inputs;
  if (!matrix.transposed) {
    const float* from = matrix.w + chunk.first;
    for (int64_t i = 0; i < inputs; ++i, from += matrix.outputs, to += width) {
      if (chunk.lanes == FloatChunk::kMost) {
        std::memcpy(to, from, FloatChunk::kMost * sizeof(float));
      } else {
        std::memcpy(to, from, chunk.lanes * sizeof(float));
        std::fill(to + chunk.lanes, to + width, 0.0f);
      }
    }
    return;
  }
  const float* from = matrix.w + chunk.first * inputs;
  for (int64_t o = 0; o < width; o += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, chunk.lanes - o);
    int64_t i = 0;
    for (; rows == kLanes && i + kLanes <= inputs; i += kLanes)
      TransposeSquare(from + o * inputs + i, inputs, to + i * width + o, width);
    for (; i < inputs; ++i)
      for (int64_t r = 0; r < kLanes; ++r) to[i * width + o + r] = r < rows ? from[(o + r) * inputs + i] : 0.0f;
  }
}

// Multiplies pixels, which are x_step values apart, with a chunk of columns and calls
// finish(first pixel, number of pixels, sums[pixels][chunk.width()]) tile by tile.
template <typename Finish>
void MultiplyChunk(const float* x, int64_t x_step, int64_t pixels, const Matrix& matrix, const FloatChunk& chunk,
                   Finish finish) {
  const int64_t width = chunk.width();
  float* panel = ThreadScratch<float>(1, matrix.inputs * width);
  PackPanel(matrix, chunk, panel);
  alignas(64) float sums[kTileRows * FloatChunk::kMost];
  ForTiles(pixels, [&](int64_t begin, int count) {
    OutputTileOf<float>(count, chunk.vectors, kTiles)(sums, width, x + begin * x_step, x_step, 0, panel, width, 1,
                                                      matrix.inputs, width);
    finish(begin, count, sums);
  });
}

// How MultiplyTwice divides the pixels; bottleneck values of neighboring pixels are `step` values apart.
struct Blocks {
  int64_t pixels, step, count;
  bool shares_columns;  // one block, whose columns are divided among the threads

  Blocks(int64_t pixels, int64_t inputs, int64_t bottleneck, int64_t threads)
      : pixels(pixels),
        step(DivideUp(bottleneck, FloatChunk::kMost) * FloatChunk::kMost + Lanes<float>::kCount),
        count(1),
        shares_columns(pixels < kPixelsWorthABlock * std::min<int64_t>(threads, 8)) {
    if (shares_columns) return;
    const int64_t most = kBlockBytes / ((inputs + step) * static_cast<int64_t>(sizeof(float)));
    count = DivideUp(DivideUp(pixels, std::max<int64_t>(most, kTileRows)), threads) * threads;
  }
};

// Multiplies x [pixels][first.inputs] by first, calls activate(block, pixel, count, chunk, sums, bottleneck) to make
// bottleneck values [count][blocks.step] of every tile's sums, multiplies these by second and calls finish(pixel,
// count, chunk, sums).
template <typename Activate, typename Finish>
void MultiplyTwice(ffi::ThreadPool& pool, const Blocks& blocks, const float* x, const Matrix& first,
                   const Matrix& second, Activate activate, Finish finish) {
  const int64_t pixels = blocks.pixels, step = blocks.step;
  const int64_t chunks = FloatChunk::Count(first.outputs), last_chunks = FloatChunk::Count(second.outputs);
  const auto multiply_first = [&](int64_t block, int64_t begin, int64_t end, int64_t index, float* bottleneck) {
    const FloatChunk chunk(first.outputs, index);
    MultiplyChunk(x + begin * first.inputs, first.inputs, end - begin, first, chunk,
                  [&](int64_t at, int count, const float* sums) {
                    activate(block, begin + at, count, chunk, sums, bottleneck + at * step + chunk.first);
                  });
  };
  const auto multiply_second = [&](int64_t begin, int64_t end, int64_t index, const float* bottleneck) {
    const FloatChunk chunk(second.outputs, index);
    MultiplyChunk(bottleneck, step, end - begin, second, chunk,
                  [&](int64_t at, int count, const float* sums) { finish(begin + at, count, chunk, sums); });
  };
  if (blocks.shares_columns) {
    float* bottleneck = ThreadScratch<float>(2, pixels * step);  // kept: new memory of this size costs its page faults
    ParallelFor(pool, chunks, [&](int64_t index) { multiply_first(0, 0, pixels, index, bottleneck); });
    const int64_t most = std::max<int64_t>(DivideUp(pixels, kTileRows), 1);
    const int64_t parts = std::clamp<int64_t>(DivideUp(2 * pool.num_threads(), last_chunks), 1, most);
    ParallelFor(pool, parts * last_chunks, [&](int64_t task) {
      const int64_t part = task / last_chunks, begin = pixels * part / parts, end = pixels * (part + 1) / parts;
      multiply_second(begin, end, task % last_chunks, bottleneck + begin * step);
    });
    return;
  }
  ParallelFor(pool, blocks.count, [&](int64_t block) {
    const int64_t begin = pixels * block / blocks.count, end = pixels * (block + 1) / blocks.count;
    float* bottleneck = ThreadScratch<float>(0, (end - begin) * step);
    for (int64_t index = 0; index < chunks; ++index) multiply_first(block, begin, end, index, bottleneck);
    for (int64_t index = 0; index < last_chunks; ++index) multiply_second(begin, end, index, bottleneck);
  });
}

// Computes dw [rows][columns], the sum over pixels of a [pixels][rows] times b [pixels][columns].
inline void MultiplyOverPixels(ffi::ThreadPool& pool, int64_t pixels, const float* a, int64_t rows, const float* b,
                               int64_t columns, float* dw) {
  const int64_t chunks = FloatChunk::Count(columns);
  const int64_t parts = std::clamp<int64_t>(DivideUp(4 * pool.num_threads(), chunks), 1, DivideUp(rows, kTileRows));
  ParallelFor(pool, chunks * parts, [&](int64_t task) {
    const FloatChunk chunk(columns, task / parts);
    const int64_t part = task % parts, first = rows * part / parts, count = rows * (part + 1) / parts - first;
    const int64_t width = chunk.width();
    float* panel = ThreadScratch<float>(0, kPixelsOfAPanel * width);
    float* sums = ThreadScratch<float>(1, count * width);
    std::fill(sums, sums + count * width, 0.0f);
    for (int64_t begin = 0; begin < pixels; begin += kPixelsOfAPanel) {
      const int64_t own = std::min(kPixelsOfAPanel, pixels - begin);
      PackPanel({b + begin * columns, own, columns, false}, chunk, panel);
      ForTiles(count, [&](int64_t row, int tile) {
        float* sum = sums + row * width;
        KernelTileOf<float>(tile, chunk.vectors, kTiles)(sum, width, sum, a + begin * rows + first + row, rows, 0, panel,
                                                         0, 1, own, width);
      });
    }
    for (int64_t row = 0; row < count; ++row)
      std::memcpy(dw + (first + row) * columns + chunk.first, sums + row * width, chunk.lanes * sizeof(float));
  });
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_BOTTLENECK_H_
