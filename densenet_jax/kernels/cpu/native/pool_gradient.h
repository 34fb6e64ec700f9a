// The gradient of max pooling.

#ifndef DENSENET_JAX_KERNELS_CPU_NATIVE_POOL_GRADIENT_H_
#define DENSENET_JAX_KERNELS_CPU_NATIVE_POOL_GRADIENT_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sizes.h"
#include "threads.h"

namespace densenet_jax {

// Calls visit(tap, pixel of x) for the taps of a square window that lie inside the image.
template <typename F>
void ForWindow(const Sizes& s, int64_t row, int64_t column, F visit) {
  for (int64_t i = 0; i < s.kernel_height; ++i) {
    const int64_t y = row * s.stride + i - s.padding;
    if (y < 0 || y >= s.height) continue;
    for (int64_t j = 0; j < s.kernel_width; ++j) {
      const int64_t x = column * s.stride + j - s.padding;
      if (x >= 0 && x < s.width) visit(static_cast<int32_t>(i * s.kernel_width + j), y * s.width + x);
    }
  }
}

// Computes dx: each window's gradient goes to the first of its largest values.
template <typename T>
void PoolGradient(ffi::ThreadPool& pool, const Sizes& s, const T* x, const T* g, T* dx) {
  ParallelFor(pool, s.batch, [&](int64_t image) {
    const int64_t channels = s.channels, size = s.height * s.width * channels;
    const T* from = x + image * size;
    T* to = dx + image * size;
    std::fill(to, to + size, T{0});
    std::vector<T> best(channels);
    std::vector<int32_t> chosen(channels);
    T* most = best.data();
    int32_t* which = chosen.data();
    for (int64_t row = 0; row < s.out_height; ++row) {
      for (int64_t column = 0; column < s.out_width; ++column) {
        bool first = true;
        ForWindow(s, row, column, [&](int32_t tap, int64_t pixel) {
          const T* values = from + pixel * channels;
          if (first) {
            std::copy(values, values + channels, most);
            std::fill(which, which + channels, tap);
            first = false;
            return;
          }
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) {
            const bool larger = values[c] > most[c];
            which[c] = larger ? tap : which[c];
            most[c] = larger ? values[c] : most[c];
          }
        });
        const T* gradient = g + ((image * s.out_height + row) * s.out_width + column) * channels;
        ForWindow(s, row, column, [&](int32_t tap, int64_t pixel) {
          T* sums = to + pixel * channels;
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) sums[c] += which[c] == tap ? gradient[c] : T{0};
        });
      }
    }
  });
}

}  // namespace densenet_jax

#endif  // DENSENET_JAX_KERNELS_CPU_NATIVE_POOL_GRADIENT_H_
