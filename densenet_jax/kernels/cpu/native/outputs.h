// Outputs of convolutions, and what is made of them while they are in cache: moments, gradients of what was read.

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
struct Prepared {  // a convolution cut into bands, and its weights
  Sizes sizes;
  int64_t pixels;
  Weights<T> weights;
  Bands bands;

  Prepared(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, int64_t threads)
      : sizes(s.pointwise() ? AsLines(s, sizeof(T)) : s),
        pixels(s.batch * s.out_height * s.out_width),
        weights(pool, s, kernel),
        bands(sizes, sizeof(T), threads) {}
};

// Computes a band of outputs, of y_step channels a pixel, and calls done(first pixel, pixels, their y); where y is null,
// that lies in the thread's own memory and is gone afterwards.
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
  for (int64_t index = 0; index < Chunk<T>::Count(s.out_channels); ++index) {
    const Chunk<T> chunk(s.out_channels, index);
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

// Convolutions of s side by side: `blocks` of them, each of its own channels and with its weights, all cut alike.
template <typename T>
class Blocks {
 public:
  // The kernel is that of the first block.
  Blocks(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, Kernel<T> kernel) : pool_(pool) {
    for (int64_t i = 0; i < blocks; ++i, kernel.first += kernel.together)
      prepared_.emplace_back(pool, s, kernel, DivideUp(pool.num_threads(), blocks));
  }

  int64_t count() const { return static_cast<int64_t>(prepared_.size()); }
  int64_t bands() const { return prepared_[0].bands.count; }

  // Runs run(block, band), on all threads; it is to call Band.
  template <typename F>
  void ForBands(F run) const {
    ParallelFor(pool_, count() * bands(), [&](int64_t task) { run(task / bands(), task % bands()); });
  }

  // OutputBand of a block, the source that of the first one; done(at, count, y).
  template <typename F>
  void Band(int64_t block, int64_t band, const Source<T>& source, T* y, int64_t y_step, F done) const {
    const Prepared<T>& p = prepared_[block];
    OutputBand<T>(p, band, source.From(block * p.sizes.channels), y, y_step, done);
  }

 private:
  ffi::ThreadPool& pool_;
  std::vector<Prepared<T>> prepared_;
};

// y = what is read of the source, convolved.
template <typename T>
void Output(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& source, Kernel<T> kernel, T* y) {
  const Blocks<T> all(pool, s, blocks, kernel);
  all.ForBands([&](int64_t block, int64_t band) {
    T* own = y + block * s.out_channels;
    all.Band(block, band, source, own, blocks * s.out_channels, [](int64_t, int64_t, T*) {});
  });
}

// Two sums over all pixels for each channel, of `channels` each in `blocks` blocks, added up from those of bands in the
// bands' order, whichever threads made them.
template <typename T>
class TwoSums {
 public:
  TwoSums(int64_t blocks, int64_t bands, int64_t channels)
      : blocks_(blocks), bands_(bands), channels_(channels), sums_(Allocate<T>(blocks * bands * 2 * channels)) {}

  T* Of(int64_t block, int64_t band) {  // zeros at first: the first sums, behind them the second
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

// Output, with kAdd added to what y holds, and the sums over all pixels of y - shift and of its square.
template <bool kAdd, typename T>
void OutputWithMoments(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& source, Kernel<T> kernel,
                       const T* shift, T* y, T* sum, T* square) {
  const Blocks<T> all(pool, s, blocks, kernel);
  const int64_t channels = s.out_channels, y_step = blocks * channels;
  TwoSums<T> sums(blocks, all.bands(), channels);
  all.ForBands([&](int64_t block, int64_t band) {
    const T* about = shift + block * channels;
    T* own = y + block * channels;
    const auto take_in = [&](int64_t at, int64_t count, T* out) {
      T *sum = sums.Of(block, band), *square = sum + channels, *to = own + at * y_step;
      for (int64_t i = 0; i < count; ++i, out += kAdd ? channels : y_step, to += y_step) {
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          const T value = kAdd ? to[c] + out[c] : out[c], centered = value - about[c];
          if (kAdd) to[c] = value;
          sum[c] += centered;
          square[c] += centered * centered;
        }
      }
    };
    all.Band(block, band, source, kAdd ? nullptr : own, kAdd ? channels : y_step, take_in);
  });
  sums.AddUp(sum, square);
}

// The gradient of the x^ of relu(scale * x^ + bias), from that of the rectified values: added to what `to` holds with
// kAdd; and, summed, those of scale and of bias.
template <bool kAdd, bool kNormalise, typename T>
void UnrectifyPixels(Source<T> read, int64_t pixels, int64_t channels, const T* gradient, T* to, int64_t to_step,
                     T* of_scale, T* of_bias) {
  for (int64_t i = 0; i < pixels; ++i, read.x += read.step, to += to_step, gradient += channels) {
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const T x = Normalized<kNormalise>(read, c);
      const T open = read.scale[c] * x + read.bias[c] > T{0} ? gradient[c] : T{0};
      of_bias[c] += open;
      of_scale[c] += open * x;
      to[c] = (kAdd ? to[c] : T{0}) + open * read.scale[c];
    }
  }
}

// The gradient of relu(scale * x^ + bias) convolved with w, given that of the output (source g): that of x^, of dx_step
// channels a pixel and with kAdd added to what is there, and, summed over all pixels, those of scale and bias. s are the
// sizes of each block's transposed convolution.
template <bool kAdd, typename T>
void ReadGradient(ffi::ThreadPool& pool, const Sizes& s, int64_t blocks, const Source<T>& g, Kernel<T> kernel,
                  const Source<T>& read, T* dx, int64_t dx_step, T* dscale, T* dbias) {
  const Blocks<T> all(pool, s, blocks, kernel);
  const int64_t channels = s.out_channels;
  TwoSums<T> sums(blocks, all.bands(), channels);
  all.ForBands([&](int64_t block, int64_t band) {
    const Source<T> own = read.From(block * channels);
    const auto unrectify = [&](int64_t at, int64_t count, T* gradient) {
      const auto run = own.mean == nullptr ? UnrectifyPixels<kAdd, false, T> : UnrectifyPixels<kAdd, true, T>;
      T *of_scale = sums.Of(block, band), *to = dx + at * dx_step + block * channels;
      run(own.AtPixel(at), count, channels, gradient, to, dx_step, of_scale, of_scale + channels);
    };
    all.Band(block, band, g, nullptr, channels, unrectify);
  });
  sums.AddUp(dscale, dbias);
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_OUTPUTS_H_
