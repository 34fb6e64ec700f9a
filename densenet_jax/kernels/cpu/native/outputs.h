// Outputs of convolutions, with their sums or the gradients of norm and ReLU computed while they are in cache.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_OUTPUTS_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_OUTPUTS_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "input_rows.h"
#include "sizes.h"
#include "threads.h"
#include "tiles.h"
#include "weights.h"

namespace densenet_jax {

template <typename T>
struct Prepared {  // a convolution's bands and weights
  Sizes sizes;
  int64_t pixels;
  Weights<T> weights;
  Bands bands;

  Prepared(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, int64_t threads)
      : sizes(s.pointwise() ? AsLines(s, sizeof(T), threads) : s),
        pixels(s.batch * s.out_height * s.out_width),
        weights(pool, s, kernel),
        bands(sizes, sizeof(T), threads) {}
};

// Computes a chunk of a pointwise convolution's outputs, and fetches the next chunk's weights meanwhile: a part of them
// with each tile.
template <typename T>
void PixelTiles(int64_t pixels, const Chunk<T>& chunk, const Chunk<T>& next, const T* x, int64_t inputs,
                const Weights<T>& weights, T* out, int64_t out_step) {
  Ahead ahead(weights.Of(next), weights.IsPacked() ? next.width() : 0, DivideUp(pixels, kTileRows));
  ForTiles(pixels, [&](int64_t pixel, int tile) {
    PixelTileOf<T, false>(tile, chunk.vectors, kTiles)(out + pixel * out_step + chunk.first, out_step,
                                                       x + pixel * inputs, inputs, weights.Of(chunk),
                                                       weights.Step(chunk), inputs, chunk.lanes, ahead);
    ahead.Skip(inputs);
  });
}

// Computes a band of outputs, whose pixels are y_step values apart, and calls done(first pixel, pixels, their y). If y
// is null, they are in scratch memory, valid until done returns.
template <typename T, typename F>
void OutputBand(const Prepared<T>& prepared, int64_t band, const Source<T>& source, T* y, int64_t y_step, F done) {
  const auto& [s, all_pixels, weights, bands] = prepared;
  const int64_t row_step = s.padded_width() * s.channels, pixel_step = s.stride * s.channels;
  const int64_t image = band / bands.per_image, begin = band % bands.per_image * bands.rows_each;
  const int64_t end = std::min(begin + bands.rows_each, s.out_height);
  const int64_t at = (image * s.out_height + begin) * s.out_width;
  const int64_t count = std::min((end - begin) * s.out_width, all_pixels - at);
  const T* rows = InputRows(s, source, image, begin, end, all_pixels);
  T* out = y == nullptr ? ThreadScratch<T>(2, count * y_step) : y + at * y_step;
  const int64_t chunks = Chunk<T>::Count(s.out_channels);
  for (int64_t index = 0; index < chunks; ++index) {
    const Chunk<T> chunk(s.out_channels, index);
    if (s.pointwise()) {
      PixelTiles<T>(count, chunk, Chunk<T>(s.out_channels, (index + 1) % chunks), rows, s.channels, weights, out, y_step);
      continue;
    }
    for (int64_t row = 0; row < end - begin; ++row) {
      const int64_t columns = std::min(s.out_width, count - row * s.out_width);
      const T* from = rows + row * s.stride * row_step;
      T* to = out + row * s.out_width * y_step + chunk.first;
      ForTiles(columns, [&](int64_t column, int tile) {
        OutputTileOf<T>(tile, chunk.vectors, kTiles)(to + column * y_step, y_step, from + column * pixel_step,
                                                     pixel_step, row_step, weights.Of(chunk), weights.Step(chunk),
                                                     s.kernel_height, s.run(), chunk.lanes);
      });
    }
  }
  done(at, count, out);
}

// Convolutions of sizes s side by side, each of its own channels and with its own weights, all in equal bands.
template <typename T>
class Blocks {
 public:
  // Takes the kernel of the first block.
  Blocks(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, Kernel<T> kernel) : pool_(pool) {
    for (int64_t i = 0; i < blocks; ++i, kernel.first += kernel.together)
      prepared_.emplace_back(pool, s, kernel, DivideUp(pool.num_threads(), blocks));
  }

  int64_t count() const { return static_cast<int64_t>(prepared_.size()); }
  int64_t bands() const { return prepared_[0].bands.count; }

  // Calls run(block, band) for all bands, on all threads; run calls Band.
  template <typename F>
  void ForBands(F run) const {
    ParallelFor(pool_, count() * bands(), [&](int64_t task) { run(task % count(), task / count()); });
  }

  // Computes OutputBand of a block; source is that of the first block.
  template <typename F>
  void Band(int64_t block, int64_t band, const Source<T>& source, T* y, int64_t y_step, F done) const {
    const Prepared<T>& p = prepared_[block];
    OutputBand<T>(p, band, source.From(block * p.sizes.channels), y, y_step, done);
  }

 private:
  ffi::ThreadPool& pool_;
  std::vector<Prepared<T>> prepared_;
};

// Computes y, the source convolved.
template <typename T>
void Output(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& source, Kernel<T> kernel, T* y) {
  const Blocks<T> all(pool, s, blocks, kernel);
  all.ForBands([&](int64_t block, int64_t band) {
    T* own = y + block * s.out_channels;
    all.Band(block, band, source, own, blocks * s.out_channels, [](int64_t, int64_t, T*) {});
  });
}

// Two sums over all pixels for each of `channels` channels of each block. The bands' sums are added in the order of the
// bands, so that the result does not depend on the threads.
template <typename T>
class TwoSums {
 public:
  TwoSums(int64_t blocks, int64_t bands, int64_t channels)
      : blocks_(blocks), bands_(bands), channels_(channels), sums_(Allocate<T>(blocks * bands * 2 * channels)) {}

  T* Start(int64_t block, int64_t band) {  // zeros: the band's first sums, then its second sums
    T* sums = sums_.get() + (block * bands_ + band) * 2 * channels_;
    std::fill(sums, sums + 2 * channels_, T{0});
    return sums;
  }

  void AddUp(T* first, T* second) const {
    for (int64_t block = 0; block < blocks_; ++block, first += channels_, second += channels_) {
      std::fill(first, first + channels_, T{0});
      std::fill(second, second + channels_, T{0});
      for (int64_t band = 0; band < bands_; ++band) {
        const T* sums = sums_.get() + (block * bands_ + band) * 2 * channels_;
        for (int64_t c = 0; c < channels_; ++c) first[c] += sums[c], second[c] += sums[channels_ + c];
      }
    }
  }

 private:
  const int64_t blocks_, bands_, channels_;
  std::unique_ptr<T[], void (*)(T*)> sums_;
};

// Where a pixel's outputs go, `channels` in all: to y, with `added` added unless that is null; those from `split` on to
// `other`, unless that is null.
template <typename T>
struct Destination {
  T* y;
  int64_t channels;
  const T* added = nullptr;
  T* other = nullptr;
  int64_t split = 0;

  bool is_direct() const { return added == nullptr && other == nullptr; }
  // Writes a vector of outputs of a pixel, and returns it as it is written.
  template <typename Vector>
  Vector Write(Vector value, int64_t pixel, int64_t channel, int64_t lanes) const {
    if (other != nullptr && channel >= split) {
      StoreLanes<T>(value, other + pixel * (channels - split) + channel - split, lanes);
      return value;
    }
    const int64_t at = pixel * (other == nullptr ? channels : split) + channel;
    if (added != nullptr) value = LoadLanes(added + at, lanes) + value;
    StoreLanes<T>(value, y + at, lanes);
    return value;
  }
};

// Computes Output, and the sums over all pixels of y - shift and of its square. The destination is that of all blocks.
template <typename T>
void OutputWithSums(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& source, Kernel<T> kernel,
                    const T* shift, const Destination<T>& to, T* sum, T* square) {
  using Vector = typename Lanes<T>::Vector;
  const Blocks<T> all(pool, s, blocks, kernel);
  const bool is_direct = to.is_direct();
  const int64_t channels = s.out_channels, out_step = is_direct ? to.channels : channels;
  TwoSums<T> sums(blocks, all.bands(), channels);
  all.ForBands([&](int64_t block, int64_t band) {
    const T* about = shift + block * channels;
    const auto add_sums = [&](int64_t at, int64_t count, T* out) {
      T *sum = sums.Start(block, band), *square = sum + channels;
      ForVectors<T>(count, channels, [&](int64_t pixel, int64_t pixels, int64_t channel, int64_t lanes) {
        const Vector middle = LoadLanes(about + channel, lanes);
        Vector total = LoadLanes(sum + channel, lanes), squares = LoadLanes(square + channel, lanes);
        const T* from = out + pixel * out_step + channel;
        for (int64_t i = 0; i < pixels; ++i, from += out_step) {
          Vector value = LoadLanes(from, lanes);
          if (!is_direct) value = to.Write(value, at + pixel + i, block * channels + channel, lanes);
          const Vector centered = value - middle;
          total += centered;
          squares += centered * centered;
        }
        StoreLanes(total, sum + channel, lanes);
        StoreLanes(squares, square + channel, lanes);
      });
    };
    all.Band(block, band, source, is_direct ? to.y + block * channels : nullptr, out_step, add_sums);
  });
  sums.AddUp(sum, square);
}

// Computes the gradient of x_hat from that of relu(scale * x_hat + bias), with kAdd added to `to`, and adds those of
// scale and bias to grad_scale and grad_bias.
template <bool kAdd, bool kNormalize, typename T>
void NormReluGradient(const Source<T>& read, int64_t pixels, int64_t channels, const T* gradient, int64_t step, T* to,
                      int64_t to_step, T* grad_scale, T* grad_bias) {
  using Vector = typename Lanes<T>::Vector;
  ForVectors<T>(pixels, channels, [&](int64_t pixel, int64_t count, int64_t channel, int64_t lanes) {
    const NormVector<kNormalize, T> norm(read, channel, lanes);
    Vector of_scale = LoadLanes(grad_scale + channel, lanes), of_bias = LoadLanes(grad_bias + channel, lanes);
    const T *x = read.x + pixel * read.step + channel, *from = gradient + pixel * step + channel;
    T* own = to + pixel * to_step + channel;
    for (int64_t i = 0; i < count; ++i, x += read.step, from += step, own += to_step) {
      const Vector x_hat = norm.Normalize(LoadLanes(x, lanes));
      const Vector masked = norm.Affine(x_hat) > Vector{} ? LoadLanes(from, lanes) : Vector{};
      of_bias += masked;
      of_scale += masked * x_hat;
      const Vector added = kAdd ? LoadLanes(own, lanes) : Vector{};
      StoreLanes<T>(added + masked * norm.scale, own, lanes);
    }
    StoreLanes(of_scale, grad_scale + channel, lanes);
    StoreLanes(of_bias, grad_bias + channel, lanes);
  });
}

// Computes the gradients of relu(scale * x_hat + bias), convolved, from the output's gradient g: that of x_hat, whose
// pixels are dx_step values apart, with kAdd added to dx; and those of scale and bias, summed over all pixels. What
// belongs to another array that is read is added to `other`. s are the sizes of a block's transposed convolution.
template <bool kAdd, typename T>
void InputGradients(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& g, Kernel<T> kernel,
                    const Source<T>& read, T* dx, int64_t dx_step, T* dscale, T* dbias, T* other = nullptr,
                    int64_t other_step = 0) {
  const Blocks<T> all(pool, s, blocks, kernel);
  const int64_t channels = s.out_channels;
  TwoSums<T> sums(blocks, all.bands(), channels);
  all.ForBands([&](int64_t block, int64_t band) {
    const Source<T> own = read.From(block * channels);
    const auto backpropagate = [&](int64_t at, int64_t count, T* gradient) {
      T* grad_scale = sums.Start(block, band);
      own.AtPixel(at).ForArrays(channels, [&](const Source<T>& one, int64_t first, int64_t own_channels) {
        const bool is_other = first > 0;
        const auto set = one.mean == nullptr ? NormReluGradient<kAdd, false, T> : NormReluGradient<kAdd, true, T>;
        const auto add = one.mean == nullptr ? NormReluGradient<true, false, T> : NormReluGradient<true, true, T>;
        const int64_t step = is_other ? other_step : dx_step;
        T* to = is_other ? other + at * step : dx + at * step + block * channels;
        (is_other ? add : set)(one, count, own_channels, gradient + first, channels, to, step, grad_scale + first,
                               grad_scale + channels + first);
      });
    };
    all.Band(block, band, g, nullptr, channels, backpropagate);
  });
  sums.AddUp(dscale, dbias);
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_OUTPUTS_H_
