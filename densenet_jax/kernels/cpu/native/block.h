// The convolutions of a whole block, one after another in one call: threads stay awake between them.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_BLOCK_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_BLOCK_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "input_rows.h"
#include "products.h"
#include "rounded.h"
#include "sizes.h"
#include "team.h"
#include "tiles.h"
#include "weights.h"

namespace densenet_jax {

constexpr int64_t kStepBytes = 192 * 1024;     // of the input that one task of a step reads
constexpr int64_t kTaskProducts = 2000 * 1000;  // worth a task
// A 1x1 convolution reads weights ahead, and once a task, if it has few pixels, or more weights and not many pixels; a
// larger one whenever it has more weights.
constexpr int64_t kFewPixels = 112, kManyPixels = 512, kWeightBytes = 512 * 1024;
constexpr int64_t kPixelsAtOnce = 128, kInputBytes = 768 * 1024, kLeastInputs = 256;  // of such a task

// One convolution of relu(scale * x + bias). Output channel o of a pixel goes to y[o]; the first `added` are added to
// total[o] instead. Pixels of both are y_step values apart.
template <typename T>
struct Step {
  Sizes sizes;  // of all groups
  int64_t groups;
  Source<T> source;
  const T* kernel;
  bool packed;  // weights are as `Pack` lays them out
  bool pooled;  // reads means of 2x2 pixels; only for 1x1 kernels, at stride 2
  RoundedKernel rounded;
  T *y, *total;
  int64_t y_step, added;

  Outputs outputs() const { return {y, total, y_step, added}; }
  int64_t pixels() const { return sizes.batch * sizes.out_height * sizes.out_width; }
  bool has_many_weights() const {
    return sizes.kernel_height * sizes.run() * sizes.out_channels * static_cast<int64_t>(sizeof(T)) > kWeightBytes;
  }
  int64_t tasks(int64_t threads) const {
    const Sizes& s = sizes;
    const int64_t products = pixels() * s.kernel_height * s.run() * s.out_channels / groups;
    return CountTasks(products, kTaskProducts, threads);
  }
};

// Calls compute(to, step of to's pixels) for a tile of outputs from pixel `at` on and channel `first` on.
template <typename T, typename F>
void StoreOrAdd(const Step<T>& step, int64_t at, int tile, int64_t first, int64_t lanes, F compute) {
  if (first >= step.added) return compute(step.y + at * step.y_step + first, step.y_step);
  constexpr int64_t kMost = Chunk<T>::kMost;
  alignas(64) T sums[kTileRows * kMost];
  compute(sums, kMost);
  const int64_t added = std::min(lanes, step.added - first);
  for (int m = 0; m < tile; ++m) {
    T *total = step.total + (at + m) * step.y_step + first, *y = step.y + (at + m) * step.y_step + first;
#pragma GCC ivdep
    for (int64_t o = 0; o < added; ++o) total[o] += sums[m * kMost + o];
    for (int64_t o = added; o < lanes; ++o) y[o] = sums[m * kMost + o];
  }
}

// The weights of a step without groups, packed first if reading them where they lie is slower.
template <typename T>
struct StepWeights {
  const T* weights;
  int64_t chunk_step, step;

  StepWeights(Team& team, const Step<T>& of)
      : weights(of.kernel), chunk_step(of.sizes.kernel_height * of.sizes.run()), step(0) {
    if (of.packed) return;
    const int64_t outputs = of.sizes.out_channels;
    const bool narrow = outputs % Lanes<T>::kCount == 0 && outputs * static_cast<int64_t>(sizeof(T)) <= kUnpackedBytes;
    if (narrow && of.pixels() <= kUnpackedPixels) {
      chunk_step = 1, step = outputs;
      return;
    }
    T* to = ThreadScratch<T>(3, chunk_step * DivideUp(outputs, Lanes<T>::kCount) * Lanes<T>::kCount);
    PackRows(team, of.sizes, Kernel<T>{of.kernel, outputs, 0, 1, false}, to);
    weights = to;
  }
  const T* Of(const Chunk<T>& chunk) const { return weights + chunk.first * chunk_step; }
  int64_t Step(const Chunk<T>& chunk) const { return step ? step : chunk.width(); }
};

// Writes the mean of relu(scale * x + bias) of 2x2 pixels, from `pixel` on in lines of `width`.
template <typename T>
void AveragePixels(const Source<T>& source, int64_t pixel, int64_t width, int64_t channels, T* to) {
  T* four = ThreadScratch<T>(2, 4 * channels);
  CopyPixels(source.AtPixel(pixel), 2, channels, four);
  CopyPixels(source.AtPixel(pixel + width), 2, channels, four + 2 * channels);
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c)
    to[c] = (four[c] + four[channels + c] + four[2 * channels + c] + four[3 * channels + c]) * T{0.25};
}

// Copies `count` inputs of a 1x1 convolution, from `input` on, of the outputs' pixels from `begin` on.
template <typename T>
void CopyInputs(const Step<T>& step, int64_t begin, int64_t pixels, int64_t input, int64_t count, T* to) {
  const Sizes& s = step.sizes;
  const Source<T> source = step.source.From(input);
  if (s.stride == 1) return CopyPixels(source.AtPixel(begin), pixels, count, to);
  for (int64_t i = 0; i < pixels; ++i, to += count) {
    const int64_t row = (begin + i) / s.out_width, image = row / s.out_height;
    const int64_t line = image * s.height + row % s.out_height * s.stride;
    const int64_t pixel = line * s.width + (begin + i) % s.out_width * s.stride;
    if (step.pooled)
      AveragePixels(source, pixel, s.width, count, to);
    else
      CopyPixels(source.AtPixel(pixel), 1, count, to);
  }
}

// A tile of a 1x1 convolution: pixels [at, at + size) of the outputs, whose inputs [input, input + inputs) are in x.
template <typename T>
struct Pixels {
  int64_t at;
  int size;
  const T* x;
  int64_t input, inputs;
};

// Computes a tile for a chunk of outputs: sets those of the first inputs, unless they belong to the total, and adds the
// others. Meanwhile fetches a share of the next chunk's weights, one of `shares`.
template <typename T>
void AddInputs(const Step<T>& step, const StepWeights<T>& weights, const Chunk<T>& chunk, const Pixels<T>& tile,
               int64_t share, int64_t shares) {
  const int64_t lanes = chunk.lanes, added = std::clamp<int64_t>(step.added - chunk.first, 0, lanes);
  const int64_t to_step = step.y_step, w_step = weights.Step(chunk);
  const T* w = weights.Of(chunk) + tile.input * w_step;
  Ahead ahead(w + step.sizes.channels * chunk.width(), chunk.width(), shares);
  ahead.Skip(tile.inputs, share);
  T *total = step.total + tile.at * to_step + chunk.first, *y = step.y + tile.at * to_step + chunk.first;
  const auto multiply = [&](auto run, T* to, int64_t pixel_step) {
    run(to, pixel_step, tile.x, tile.inputs, w, w_step, tile.inputs, lanes, ahead);
  };
  const auto set = PixelTileOf<T, false>(tile.size, chunk.vectors, kTiles);
  if (added == 0 && tile.input == 0) return multiply(set, y, to_step);
  if (lanes == chunk.width() && added % lanes == 0)
    return multiply(PixelTileOf<T, true>(tile.size, chunk.vectors, kTiles), added ? total : y, to_step);
  constexpr int64_t kMost = Chunk<T>::kMost;
  alignas(64) T sums[kTileRows * kMost];
  multiply(set, sums, kMost);
  for (int m = 0; m < tile.size; ++m, total += to_step, y += to_step) {
#pragma GCC ivdep
    for (int64_t o = 0; o < added; ++o) total[o] += sums[m * kMost + o];
#pragma GCC ivdep
    for (int64_t o = added; o < lanes; ++o) y[o] = (tile.input ? y[o] : T{0}) + sums[m * kMost + o];
  }
}

// A 1x1 convolution whose weights leave a core's cache before they are read again. Tasks share the output channels if
// these outnumber the pixels, else the pixels; each reads a weight once, for all of its pixels.
template <typename T>
void RunManyWeights(Team& team, const Step<T>& step, const StepWeights<T>& weights) {
  const Sizes& s = step.sizes;
  const int64_t pixels = step.pixels(), channels = s.channels, chunks = Chunk<T>::Count(s.out_channels);
  const int64_t parts = s.out_channels > pixels ? std::min(chunks, team.size()) : 1;
  const int64_t least = parts > 1 ? parts : DivideUp(pixels, kPixelsAtOnce);  // tasks; each thread gets as many
  const int64_t tasks = DivideUp(least, team.size()) * team.size();
  const int64_t bands = std::min(DivideUp(tasks, parts), DivideUp(pixels, kTileRows / 2));
  team.Run(bands * parts, [&](int64_t task) {
    const int64_t band = task / parts, part = task % parts;
    const int64_t begin = pixels * band / bands, count = pixels * (band + 1) / bands - begin;
    const int64_t tiles = DivideUp(count, kTileRows), most = kInputBytes / static_cast<int64_t>(count * sizeof(T));
    const int64_t inputs = DivideUp(channels, DivideUp(channels, std::max<int64_t>(most, kLeastInputs)));
    T* rows = ThreadScratch<T>(0, count * inputs);
    for (int64_t input = 0; input < channels; input += inputs) {
      const int64_t own = std::min(inputs, channels - input);
      CopyInputs(step, begin, count, input, own, rows);
      for (int64_t i = chunks * tiles * part / parts; i < chunks * tiles * (part + 1) / parts; ++i) {
        const int64_t at = count * (i % tiles) / tiles, end = count * (i % tiles + 1) / tiles;
        const Pixels<T> tile{begin + at, static_cast<int>(end - at), rows + at * own, input, own};
        AddInputs(step, weights, Chunk<T>(s.out_channels, i / tiles), tile, i % tiles, tiles);
      }
    }
  });
}

// A 1x1 convolution. Tasks share the pixels.
template <typename T>
void RunPointwise(Team& team, const Step<T>& step) {
  const Sizes& s = step.sizes;
  const int64_t pixels = step.pixels(), channels = s.channels, chunks = Chunk<T>::Count(s.out_channels);
  const StepWeights<T> weights(team, step);
  if (pixels <= (step.has_many_weights() ? kManyPixels : kFewPixels)) return RunManyWeights(team, step, weights);
  const int64_t most = std::max<int64_t>(kStepBytes / (channels * sizeof(T)), kTileRows);
  int64_t bands = std::max(DivideUp(pixels, most), step.tasks(team.size()));
  bands = std::min(DivideUp(bands, team.size()) * team.size(), DivideUp(pixels, kTileRows / 2));
  team.Run(bands, [&](int64_t band) {
    const int64_t begin = pixels * band / bands, count = pixels * (band + 1) / bands - begin;
    T* rows = ThreadScratch<T>(0, count * channels);
    CopyInputs(step, begin, count, 0, channels, rows);
    for (int64_t index = 0; index < chunks; ++index) {
      const Chunk<T> chunk(s.out_channels, index);
      ForTiles(count, [&](int64_t at, int tile) {
        StoreOrAdd(step, begin + at, tile, chunk.first, chunk.lanes, [&](T* to, int64_t to_step) {
          OutputTileOf<T>(tile, chunk.vectors, kTiles)(to, to_step, rows + at * channels, channels, 0,
                                                       weights.Of(chunk), weights.Step(chunk), 1, channels,
                                                       chunk.lanes);
        });
      });
    }
  });
}

// Returns into how many bands of rows each image is cut, to make about so many tasks, all of the same size, which read
// about band_bytes at most.
inline int64_t RowBands(const Sizes& s, int64_t element_bytes, int64_t tasks, int64_t band_bytes = kStepBytes) {
  const int64_t line = s.padded_width() * s.channels * element_bytes;
  const int64_t most = std::max<int64_t>((band_bytes / line - s.kernel_height) / s.stride + 1, 1);
  const int64_t bands = DivideUp(DivideUp(s.out_height, most) * s.batch, tasks) * tasks;
  return std::min(DivideUp(bands, s.batch), s.out_height);
}

// Calls run(rows, row step, first output pixel, columns) for each output row of a band; rows are its first input rows.
template <typename T, typename F>
void ForRows(const Sizes& s, const Source<T>& source, int64_t bands, int64_t band, F run) {
  const int64_t image = band / bands, begin = s.out_height * (band % bands) / bands;
  const int64_t end = s.out_height * (band % bands + 1) / bands, line = s.padded_width() * s.channels;
  const T* rows = InputRows(s, source, image, begin, end, s.batch * s.out_height * s.out_width);
  run(rows, line, (image * s.out_height + begin) * s.out_width, end - begin);
}

// Computes a chunk of `count` output rows, from pixel `first` on, by one row of the window after another: its weights stay
// in a core's cache for all output rows, and a share of the next ones is fetched with each tile.
template <typename T>
void AddWindowRows(const Step<T>& step, const StepWeights<T>& weights, const Chunk<T>& chunk, const T* rows,
                   int64_t line, int64_t first, int64_t count) {
  const Sizes& s = step.sizes;
  const int64_t width = chunk.width(), w_step = weights.Step(chunk), pixel_step = s.stride * s.channels;
  T* sums = ThreadScratch<T>(2, count * s.out_width * width);
  for (int64_t r = 0; r < s.kernel_height; ++r) {
    const T* w = weights.Of(chunk) + r * s.run() * w_step;
    Ahead ahead(w + s.run() * w_step, width, count * DivideUp(s.out_width, kTileRows));
    for (int64_t row = 0; row < count; ++row) {
      ForTiles(s.out_width, [&](int64_t column, int tile) {
        const auto multiply = r == 0 ? PixelTileOf<T, false>(tile, chunk.vectors, kTiles)
                                     : PixelTileOf<T, true>(tile, chunk.vectors, kTiles);
        multiply(sums + (row * s.out_width + column) * width, width,
                 rows + (row * s.stride + r) * line + column * pixel_step, pixel_step, w, w_step, s.run(), width,
                 ahead);
        ahead.Skip(s.run());
      });
    }
  }
  ForTiles(count * s.out_width, [&](int64_t at, int tile) {
    StoreOrAdd(step, first + at, tile, chunk.first, chunk.lanes, [&](T* to, int64_t to_step) {
      for (int m = 0; m < tile; ++m) std::copy_n(sums + (at + m) * width, chunk.lanes, to + m * to_step);
    });
  });
}

// A convolution of any size without groups.
template <typename T>
void RunWindow(Team& team, const Step<T>& step) {
  const Sizes& s = step.sizes;
  const StepWeights<T> weights(team, step);
  const bool has_many = step.has_many_weights();
  const int64_t bands = has_many ? RowBands(s, sizeof(T), team.size(), kInputBytes)
                                 : RowBands(s, sizeof(T), step.tasks(team.size()));
  team.Run(bands * s.batch, [&](int64_t band) {
    ForRows(s, step.source, bands, band, [&](const T* rows, int64_t line, int64_t first, int64_t count) {
      for (int64_t index = 0; index < Chunk<T>::Count(s.out_channels); ++index) {
        const Chunk<T> chunk(s.out_channels, index);
        if (has_many) {
          AddWindowRows(step, weights, chunk, rows, line, first, count);
          continue;
        }
        for (int64_t row = 0; row < count; ++row) {
          ForTiles(s.out_width, [&](int64_t column, int tile) {
            const T* from = rows + row * s.stride * line + column * s.stride * s.channels;
            const auto compute = [&](T* to, int64_t to_step) {
              OutputTileOf<T>(tile, chunk.vectors, kTiles)(to, to_step, from, s.stride * s.channels, line,
                                                           weights.Of(chunk), weights.Step(chunk), s.kernel_height,
                                                           s.run(), chunk.lanes);
            };
            StoreOrAdd(step, first + row * s.out_width + column, tile, chunk.first, chunk.lanes, compute);
          });
        }
      }
    });
  });
}

// Sets every value of a vector to one of its own group of `group` channels.
template <typename T>
struct Spread {
  using Vector = typename Lanes<T>::Vector;
  typedef decltype(Vector{} < Vector{}) Index;
  Index first;  // of each lane's group

  explicit Spread(int64_t group) {
    for (int lane = 0; lane < Lanes<T>::kCount; ++lane) first[lane] = static_cast<int>(lane / group * group);
  }
  // Returns the kth of each group; lanes behind the last whole group get any value.
  static Vector Take(Vector all, Index index) {
#ifdef __clang__
    Vector spread;
    for (int lane = 0; lane < Lanes<T>::kCount; ++lane) spread[lane] = all[index[lane] & (Lanes<T>::kCount - 1)];
    return spread;
#else
    return __builtin_shuffle(all, index);
#endif
  }
};

// A 3x3 convolution of as many groups as a vector has room for, of M pixels: no products with zeros. w is [row of the
// window][input of the group][column of the window][outputs].
template <typename T, int M, int S>
void GroupsTile(T* y, int64_t y_step, const T* x, int64_t pixel_step, int64_t row_step, const T* w, int64_t group,
                const Spread<T>& spread, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  Vector sum[M][1];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sum[m][0] = Vector{};
  for (int r = 0; r < 3; ++r) {
    for (int64_t k = 0; k < group; ++k, w += 3 * Lanes<T>::kCount) {
      const auto index = spread.first + static_cast<int>(k);
      Vector weights[3];
#pragma GCC unroll 3
      for (int q = 0; q < 3; ++q) weights[q] = *reinterpret_cast<const Vector*>(w + q * Lanes<T>::kCount);
#pragma GCC unroll 32
      for (int p = 0; p < (M - 1) * S + 3; ++p) {
        const Vector all = *reinterpret_cast<const Vector*>(x + r * row_step + p * pixel_step);
        const Vector value = Spread<T>::Take(all, index);
#pragma GCC unroll 3
        for (int q = 0; q < 3; ++q)
          if (p >= q && (p - q) % S == 0 && (p - q) / S < M) sum[(p - q) / S][0] += value * weights[q];
      }
    }
  }
  StoreTile<T, M, 1>(sum, y, y_step, lanes);
}

// A convolution of one group among others, whose channels lie between those of others.
template <typename T, int M, int N>
void GroupTile(T* y, int64_t y_step, const T* x, int64_t pixel_step, int64_t column_step, int64_t row_step, const T* w,
               int64_t size, int64_t channels, int64_t lanes) {
  using Vector = typename Lanes<T>::Vector;
  Vector sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = Vector{};
  for (int64_t tap = 0; tap < size * size; ++tap) {
    const T* from = x + tap / size * row_step + tap % size * column_step;
    for (int64_t j = 0; j < channels; ++j, w += N * Lanes<T>::kCount) AddProducts<T, M, N>(sum, from + j, pixel_step, w);
  }
  StoreTile<T, M, N>(sum, y, y_step, lanes);
}

template <typename T, int... M>
auto GroupsTileOf(int rows, int64_t stride, std::integer_sequence<int, M...>) {
  static constexpr decltype(&GroupsTile<T, 1, 1>) table[2][sizeof...(M)] = {{GroupsTile<T, M + 1, 1>...},
                                                                            {GroupsTile<T, M + 1, 2>...}};
  return table[stride - 1][rows - 1];
}

template <typename T, int... M>
auto GroupTileOf(int rows, int vectors, std::integer_sequence<int, M...>) {
  static constexpr decltype(&GroupTile<T, 1, 1>) table[2][sizeof...(M)] = {{GroupTile<T, M + 1, 1>...},
                                                                           {GroupTile<T, M + 1, 2>...}};
  return table[vectors - 1][rows - 1];
}

// How the groups of a convolution are computed: in blocks of one, or of as many as a vector has room for.
template <typename T>
struct Grouping {
  // float64 isn't worth the time to compile it
  static constexpr bool kSpreads = std::is_same_v<T, float>;
  int64_t inputs, outputs;  // of one group
  bool spreads;
  int64_t together, blocks;

  explicit Grouping(const Step<T>& step)
      : inputs(step.sizes.channels / step.groups),
        outputs(step.sizes.out_channels / step.groups),
        spreads(kSpreads && inputs == outputs && inputs <= Lanes<T>::kCount / 2 && step.sizes.kernel_height == 3 &&
                step.sizes.stride <= 2),
        together(spreads ? Lanes<T>::kCount / inputs : 1),
        blocks(DivideUp(step.groups, together)) {}
  // The number of outputs of a block, in whole vectors.
  int64_t width() const { return DivideUp(together * outputs, Lanes<T>::kCount) * Lanes<T>::kCount; }
  // Whether weights that are laid out by blocks take no more room than others.
  bool IsPackable(const Step<T>& step) const {
    return step.sizes.stride <= 2 && blocks * width() == step.sizes.out_channels;
  }
};

// Lays the weights of a convolution in groups out as its tiles read them: block by block, chunk by chunk.
template <typename T>
const T* PackGroups(Team& team, const Step<T>& step, const Grouping<T>& own) {
  const int64_t size = step.sizes.kernel_height, taps = size * size, all = step.sizes.out_channels;
  T* packed = ThreadScratch<T>(3, own.blocks * taps * own.inputs * own.width());
  const int64_t tasks = std::min(own.blocks, 2 * team.size());
  team.Run(tasks, [&](int64_t task) {
    for (int64_t block = own.blocks * task / tasks; block < own.blocks * (task + 1) / tasks; ++block) {
      const int64_t most = own.together * own.outputs, first = block * most, count = std::min(most, all - first);
      for (int64_t index = 0; index < Chunk<T>::Count(count); ++index) {
        const Chunk<T> chunk(count, index);
        const int64_t width = chunk.width();
        T* to = packed + taps * own.inputs * (block * own.width() + chunk.first);
        const T* from = step.kernel + first + chunk.first;
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t input = 0; input < own.inputs; ++input, from += all) {
            const int64_t at = own.spreads ? (tap / size * own.inputs + input) * size + tap % size
                                           : tap * own.inputs + input;
            if (chunk.lanes == Chunk<T>::kMost) {
              std::memcpy(to + at * width, from, Chunk<T>::kMost * sizeof(T));
            } else if (chunk.lanes == Lanes<T>::kCount) {
              std::memcpy(to + at * width, from, Lanes<T>::kCount * sizeof(T));
            } else {
              std::copy_n(from, chunk.lanes, to + at * width);
              std::fill(to + at * width + chunk.lanes, to + (at + 1) * width, T{0});
            }
          }
        }
      }
    }
  });
  return packed;
}

// A convolution in groups. Tasks share the groups: each reads only the channels of its own.
template <typename T>
void RunGroups(Team& team, const Step<T>& step) {
  const Sizes& s = step.sizes;
  const Grouping<T> groups(step);
  const int64_t inputs = groups.inputs, together = groups.together, blocks = groups.blocks, size = s.kernel_height;
  const Spread<T> spread(inputs);
  const T* weights = step.packed ? step.kernel : PackGroups(team, step, groups);
  const int64_t parts = std::min(blocks, team.size());
  Sizes own = s;  // of the widest task
  own.channels = std::min(DivideUp(blocks, parts) * together * inputs, s.channels);
  const int64_t bands = RowBands(own, sizeof(T), DivideUp(step.tasks(team.size()), parts));
  team.Run(parts * bands * s.batch, [&](int64_t task) {
    const int64_t part = task % parts, begin = blocks * part / parts, end = blocks * (part + 1) / parts;
    const int64_t first_group = begin * together, last_group = std::min(end * together, step.groups);
    Sizes mine = s;
    mine.channels = (last_group - first_group) * inputs;
    const Source<T> source = step.source.From(first_group * inputs);
    ForRows(mine, source, bands, task / parts, [&](const T* rows, int64_t line, int64_t first, int64_t count) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t group = block * together, all = std::min(together, step.groups - group) * groups.outputs;
        for (int64_t index = 0; index < Chunk<T>::Count(all); ++index) {
          const Chunk<T> chunk(all, index);
          const int64_t output = group * groups.outputs + chunk.first;
          const T* w = weights + size * size * inputs * (block * groups.width() + chunk.first);
          for (int64_t row = 0; row < count; ++row) {
            ForTiles(s.out_width, [&](int64_t column, int tile) {
              const int64_t pixel_step = mine.channels, step_of_outputs = s.stride * pixel_step;
              const T* from = rows + row * s.stride * line + column * step_of_outputs + (group - first_group) * inputs;
              const int64_t at = first + row * s.out_width + column;
              StoreOrAdd(step, at, tile, output, chunk.lanes, [&](T* to, int64_t to_step) {
                if constexpr (Grouping<T>::kSpreads) {
                  if (groups.spreads)
                    return GroupsTileOf<T>(tile, s.stride, kTiles)(to, to_step, from, pixel_step, line, w, inputs,
                                                                   spread, chunk.lanes);
                }
                GroupTileOf<T>(tile, chunk.vectors, kTiles)(to, to_step, from, step_of_outputs, pixel_step, line, w,
                                                            size, inputs, chunk.lanes);
              });
            });
          }
        }
      }
    });
  });
}

template <typename T>
void Run(Team& team, const Step<T>& step) {
  if (step.groups > 1) return RunGroups(team, step);
  if (step.sizes.kernel_height == 1) return RunPointwise(team, step);
  RunWindow(team, step);
}

// Whether only the second step reads what the first writes, from first to last channel, and both round their inputs.
inline bool IsBottleneck(const std::vector<Step<float>>& steps, size_t index) {
  if (index + 1 >= steps.size()) return false;
  const Step<float>&first = steps[index], &second = steps[index + 1];
  const Sizes &a = first.sizes, &b = second.sizes;
  if (!first.rounded.packed || !second.rounded.packed || a.kernel_height > 1 || b.kernel_height == 1) return false;
  if (first.added > 0 || first.y != second.source.x || a.out_channels != b.channels) return false;
  for (size_t i = index + 2; i < steps.size(); ++i) {
    if (steps[i].source.x == first.y) return false;
    if (steps[i].total == first.y) break;
  }
  return first.y_step == a.out_channels;
}

// Runs steps one after another. Between a bottleneck's convolutions the feature map stays rounded.
template <typename T>
void RunSteps(Team& team, const std::vector<Step<T>>& steps) {
  if constexpr (std::is_same_v<T, float>) {
    RoundedConvolutions rounded(team);
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step<T>& step = steps[i];
      if (step.rounded.packed == nullptr) {
        Run(team, step);
      } else if (IsBottleneck(steps, i)) {
        const Step<T>& next = steps[++i];
        rounded.RunBottleneck(step.sizes, step.source, step.pooled, step.rounded, next.sizes, next.source,
                              next.rounded, next.outputs());
      } else {
        rounded.Run(step.sizes, step.source, step.pooled, step.rounded, step.outputs());
      }
    }
  } else {
    for (const Step<T>& step : steps) Run(team, step);
  }
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_BLOCK_H_
