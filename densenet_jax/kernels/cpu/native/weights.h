// A convolution's weights in the layout that tiles read.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_WEIGHTS_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_WEIGHTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "sizes.h"
#include "threads.h"
#include "tiles.h"

namespace densenet_jax {

constexpr int64_t kValuesWorthATask = 16 * 1024;  // copied by one task
// Up to this many output pixels, packing costs more than it saves if a row of weights has at most kUnpackedBytes.
constexpr int64_t kUnpackedPixels = 4096, kUnpackedBytes = 512;

// Weights [taps][inputs][outputs] of a convolution, or of `together` groups of one from group `first` on, taken as a
// convolution without groups: weights between different groups are zero. Transposed for the input's gradient: taps are
// reversed and inputs and outputs exchanged.
template <typename T>
struct Kernel {
  const T* w;
  int64_t outputs, first, together;
  bool transposed;
};

// Packs an untransposed kernel of one group, row by row, in the order of memory. Behind the last output of a row lie any
// values, which tiles don't store: whole vectors are copied wherever the kernel has as many values left.
template <typename T, typename Pool>
void PackRows(Pool& pool, const Sizes& s, const Kernel<T>& kernel, T* packed) {
  constexpr int kLanes = Lanes<T>::kCount;
  const int64_t rows = s.kernel_height * s.run(), chunks = Chunk<T>::Count(s.out_channels);
  const int64_t tasks = std::clamp<int64_t>(rows * s.out_channels / kValuesWorthATask, 1, 4 * pool.num_threads());
  ParallelFor(pool, tasks, [&](int64_t task) {
    for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
      const int64_t begin = row * kernel.outputs + kernel.first * s.out_channels;
      for (int64_t index = 0; index < chunks; ++index) {
        const Chunk<T> chunk(s.out_channels, index);
        const T* from = kernel.w + begin + chunk.first;
        T* to = packed + chunk.first * rows + row * chunk.width();
        if (begin + chunk.first + chunk.width() <= rows * kernel.outputs) {
          std::memcpy(to, from, kLanes * sizeof(T));
          if (chunk.vectors == kVectors) std::memcpy(to + kLanes, from + kLanes, kLanes * sizeof(T));
        } else {
          std::memcpy(to, from, chunk.lanes * sizeof(T));
          std::fill(to + chunk.lanes, to + chunk.width(), T{0});
        }
      }
    }
  });
}

// Interleaves the first halves of two vectors, or the second halves.
template <bool kSecond, typename Vector, int... I>
inline Vector Zip(Vector a, Vector b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I), kFrom = kSecond ? kLanes / 2 : 0;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFrom + I / 2 + I % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){(kFrom + I / 2 + I % 2 * kLanes)...});
#endif
}

// Sets to[c][r] = from[r][c] for as many rows and columns as a vector has values. Every round of zips turns one bit of
// the row's index into one of the column's.
template <typename T>
void TransposeSquare(const T* from, int64_t from_step, T* to, int64_t to_step) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>{};
  Vector rows[kLanes], zipped[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) rows[r] = *reinterpret_cast<const Vector*>(from + r * from_step);
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < kLanes / 2; ++r) {
      zipped[2 * r] = Zip<false>(rows[r], rows[r + kLanes / 2], kIndices);
      zipped[2 * r + 1] = Zip<true>(rows[r], rows[r + kLanes / 2], kIndices);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) rows[r] = zipped[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) *reinterpret_cast<Vector*>(to + r * to_step) = rows[r];
}

// Packs a transposed kernel of one group.
template <typename T>
void PackTransposed(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, T* packed) {
  constexpr int kLanes = Lanes<T>::kCount;
  const int64_t taps = s.kernel_height * s.kernel_width;
  ParallelFor(pool, Chunk<T>::Count(s.out_channels) * taps, [&](int64_t task) {
    const Chunk<T> chunk(s.out_channels, task / taps);
    const int64_t tap = task % taps, width = chunk.width();
    const T* w = kernel.w + ((taps - 1 - tap) * s.out_channels + chunk.first) * kernel.outputs;
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      for (int64_t o = 0; o < width; o += kLanes) {
        const T* from = w + o * kernel.outputs + kernel.first * s.channels + c;
        T* to = packed + chunk.first * taps * s.channels + (tap * s.channels + c) * width + o;
        const int64_t rows = std::min<int64_t>(kLanes, chunk.lanes - o);
        const int64_t columns = std::min<int64_t>(kLanes, s.channels - c);
        if (rows == kLanes && columns == kLanes) {
          TransposeSquare(from, kernel.outputs, to, width);
          continue;
        }
        for (int64_t i = 0; i < columns; ++i)
          for (int64_t r = 0; r < kLanes; ++r) to[i * width + r] = r < rows ? from[r * kernel.outputs + i] : T{0};
      }
    }
  });
}

// Packs a kernel's weights as [chunk][taps][channels][vectors of output channels].
template <typename T>
void Pack(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel, T* packed) {
  if (kernel.together == 1)
    return (kernel.transposed ? PackTransposed<T> : PackRows<T, ffi::ThreadPool>)(pool, s, kernel, packed);
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t group_channels = s.channels / kernel.together, group_outputs = s.out_channels / kernel.together;
  ParallelFor(pool, Chunk<T>::Count(s.out_channels), [&](int64_t index) {
    const Chunk<T> chunk(s.out_channels, index);
    const int64_t first = chunk.first, lanes = chunk.lanes, width = chunk.width();
    T* to = packed + first * taps * s.channels;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t group = 0; group < kernel.together; ++group) {
        const int64_t of_group = group * group_outputs;
        const int64_t begin = std::clamp<int64_t>(of_group - first, 0, lanes);
        const int64_t end = std::clamp<int64_t>(of_group + group_outputs - first, 0, lanes);
        const int64_t begin_in_group = first + begin - of_group, of_all = kernel.first + group;
        for (int64_t c = 0; c < group_channels; ++c, to += width) {
          std::fill(to, to + begin, T{0});
          if (kernel.transposed) {
            const T* from = kernel.w + ((taps - 1 - tap) * group_outputs + begin_in_group) * kernel.outputs +
                            of_all * group_channels + c;
            for (int64_t o = begin; o < end; ++o, from += kernel.outputs) to[o] = *from;
          } else if (begin < end) {
            const T* from = kernel.w + (tap * group_channels + c) * kernel.outputs + of_all * group_outputs;
            std::memcpy(to + begin, from + begin_in_group, (end - begin) * sizeof(T));
          }
          std::fill(to + std::max(begin, end), to + width, T{0});
        }
      }
    }
  });
}

// Weights in the layout that tiles read: packed, or in place where few tiles would use the packed copy.
template <typename T>
class Weights {
 public:
  Weights(ffi::ThreadPool& pool, const Sizes& s, const Kernel<T>& kernel) : packed_(nullptr, [](T*) {}) {
    constexpr int kLanes = Lanes<T>::kCount;
    const int64_t window = s.kernel_height * s.run(), pixels = s.batch * s.out_height * s.out_width;
    const bool whole = !kernel.transposed && kernel.together == 1 && s.out_channels % kLanes == 0;
    if (whole && pixels <= kUnpackedPixels && kernel.outputs * static_cast<int64_t>(sizeof(T)) <= kUnpackedBytes) {
      weights_ = kernel.w + kernel.first * s.out_channels, chunk_step_ = 1, step_ = kernel.outputs;
      return;
    }
    packed_ = Allocate<T>(window * DivideUp(s.out_channels, kLanes) * kLanes);
    Pack(pool, s, kernel, packed_.get());
    weights_ = packed_.get(), chunk_step_ = window, step_ = 0;
  }
  const T* Of(const Chunk<T>& chunk) const { return weights_ + chunk.first * chunk_step_; }
  bool IsPacked() const { return step_ == 0; }
  int64_t Step(const Chunk<T>& chunk) const { return step_ ? step_ : chunk.width(); }

 private:
  std::unique_ptr<T[], void (*)(T*)> packed_;
  const T* weights_;
  int64_t chunk_step_, step_;
};

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_WEIGHTS_H_
