// The parts of an RDNet's dense layer in float32, for XLA's CPU backend: a depthwise 7x7 convolution with the layer norm
// behind it, two 1x1 convolutions with the exact GELU between them, and the gradients of both. ../library.py registers
// the handlers at the end.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bottleneck.h"
#include "depthwise.h"
#include "gelu.h"
#include "layer_norm.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace densenet_jax {
namespace {

using Array = ffi::Buffer<ffi::F32>;
using ArrayResult = ffi::Result<Array>;
using Shape = ffi::Span<const int64_t>;

ffi::Error Invalid(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

bool HaveCount(std::initializer_list<Array> arrays, int64_t count) {
  return std::all_of(arrays.begin(), arrays.end(),
                     [&](const Array& array) { return static_cast<int64_t>(array.element_count()) == count; });
}

// Sets s to the sizes of x; false if it can't be convolved with kernel.
bool SetImages(Images& s, const Array& x, const Array& kernel) {
  const Shape shape = x.dimensions();
  if (shape.size() != 4) return false;
  s = {shape[0], shape[1], shape[2], shape[3]};
  return s.height > 0 && s.width > 0 && s.channels > 0 && HaveCount({kernel}, kTaps * s.channels);
}

// Adds up `rows` rows of `count` sums each.
void AddRows(const float* sums, int64_t rows, int64_t count, float* to) {
  std::fill(to, to + count, 0.0f);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < count; ++c) to[c] += sums[row * count + c];
}

// Computes d, x convolved depthwise with kernel, plus bias, and y, its layer norm over channels; they may be one.
ffi::Error DepthwiseNorm(ffi::ThreadPool& pool, Array x, Array kernel, Array bias, Array scale, Array shift, Array y,
                         Array d, double epsilon) {
  Images s;
  if (!SetImages(s, x, kernel) || !HaveCount({bias, scale, shift}, s.channels) ||
      !HaveCount({y, d}, s.pixels() * s.channels))
    return Invalid("shapes of a depthwise convolution with norm do not fit");
  const float *scales = scale.typed_data(), *shifts = shift.typed_data();
  float *to = y.typed_data(), *convolved = d.typed_data();
  Depthwise(pool, s, x.typed_data(), kernel.typed_data(), false, bias.typed_data(), convolved,
            [&](int64_t first, int64_t count) {
              for (int64_t at = first * s.channels; at < (first + count) * s.channels; at += s.channels)
                NormalizePixel(convolved + at, s.channels, static_cast<float>(epsilon), scales, shifts, to + at);
            });
  return ffi::Error::Success();
}

ffi::Error DepthwiseNormCall(ffi::ThreadPool pool, Array x, Array kernel, Array bias, Array scale, Array shift,
                             ArrayResult y, double epsilon) {
  return DepthwiseNorm(pool, x, kernel, bias, scale, shift, *y, *y, epsilon);
}

ffi::Error DepthwiseNormKeptCall(ffi::ThreadPool pool, Array x, Array kernel, Array bias, Array scale, Array shift,
                                 ArrayResult y, ArrayResult d, double epsilon) {
  return DepthwiseNorm(pool, x, kernel, bias, scale, shift, *y, *d, epsilon);
}

// Computes the gradients of x, kernel, bias, scale and shift from g, that of y, and `dd`, that of d.
ffi::Error DepthwiseNormGradientCall(ffi::ThreadPool pool, Array x, Array kernel, Array scale, Array d, Array g,
                                     ArrayResult dx, ArrayResult dkernel, ArrayResult dbias, ArrayResult dscale,
                                     ArrayResult dshift, ArrayResult dd, double epsilon) {
  Images s;
  if (!SetImages(s, x, kernel) || !HaveCount({scale, *dbias, *dscale, *dshift}, s.channels) ||
      !HaveCount({d, g, *dx, *dd}, s.pixels() * s.channels) || !HaveCount({*dkernel}, kTaps * s.channels))
    return Invalid("shapes of a depthwise convolution's gradient do not fit");
  const int64_t channels = s.channels, row = 3 * channels;
  const int64_t blocks = std::max<int64_t>(std::min<int64_t>(4 * pool.num_threads(), s.pixels()), 1);
  auto sums = Allocate<float>((blocks + 1) * row);
  ParallelFor(pool, blocks, [&](int64_t block) {
    float* own = sums.get() + block * row;
    std::fill(own, own + row, 0.0f);
    for (int64_t p = s.pixels() * block / blocks; p < s.pixels() * (block + 1) / blocks; ++p)
      NormalizePixelGradient(d.typed_data() + p * channels, g.typed_data() + p * channels, channels,
                             static_cast<float>(epsilon), scale.typed_data(), dd->typed_data() + p * channels, own);
  });
  float* total = sums.get() + blocks * row;
  AddRows(sums.get(), blocks, row, total);
  std::memcpy(dscale->typed_data(), total, channels * sizeof(float));
  std::memcpy(dshift->typed_data(), total + channels, channels * sizeof(float));
  std::memcpy(dbias->typed_data(), total + 2 * channels, channels * sizeof(float));
  Depthwise(pool, s, dd->typed_data(), kernel.typed_data(), true, nullptr, dx->typed_data(), [](int64_t, int64_t) {});
  DepthwiseKernelGradient(pool, s, x.typed_data(), dd->typed_data(), dkernel->typed_data());
  return ffi::Error::Success();
}

// Sizes of a layer's two 1x1 convolutions, whose kernels are [inputs][bottleneck] and [bottleneck][outputs].
struct Bottleneck {
  int64_t pixels, inputs, bottleneck, outputs;

  bool Set(const Array& x, const Array& kernel1, const Array& kernel2) {
    const Shape shape = x.dimensions(), first = kernel1.dimensions(), second = kernel2.dimensions();
    if (shape.size() == 0 || first.size() != 2 || second.size() != 2 || first[1] != second[0]) return false;
    inputs = first[0], bottleneck = first[1], outputs = second[1];
    if (std::min({inputs, bottleneck, outputs, shape[shape.size() - 1]}) < 1) return false;
    pixels = static_cast<int64_t>(x.element_count()) / shape[shape.size() - 1];
    return true;
  }
};

// Computes y = GELU(z) * kernel2 + bias2 of z = x * kernel1 + bias1, which is written to `kept` unless that is null.
ffi::Error BottleneckForward(ffi::ThreadPool& pool, Array x, Array kernel1, Array bias1, Array kernel2, Array bias2,
                             Array y, Array* kept) {
  Bottleneck s;
  if (!s.Set(x, kernel1, kernel2) || !HaveCount({x}, s.pixels * s.inputs) || !HaveCount({bias1}, s.bottleneck) ||
      !HaveCount({bias2}, s.outputs) || !HaveCount({y}, s.pixels * s.outputs) ||
      (kept != nullptr && !HaveCount({*kept}, s.pixels * s.bottleneck)))
    return Invalid("shapes of a bottleneck do not fit");
  const float *before = bias1.typed_data(), *after = bias2.typed_data();
  float *to = y.typed_data(), *z_to = kept == nullptr ? nullptr : kept->typed_data();
  const Blocks blocks(s.pixels, s.inputs, s.bottleneck, pool.num_threads());
  MultiplyTwice(
      pool, blocks, x.typed_data(), {kernel1.typed_data(), s.inputs, s.bottleneck, false},
      {kernel2.typed_data(), s.bottleneck, s.outputs, false},
      [&](int64_t, int64_t pixel, int count, const FloatChunk& chunk, const float* sums, float* bottleneck) {
        alignas(64) float bias[FloatChunk::kMost] = {}, z[FloatChunk::kMost];
        std::memcpy(bias, before + chunk.first, chunk.lanes * sizeof(float));
        for (int m = 0; m < count; ++m, sums += chunk.width(), bottleneck += blocks.step) {
          for (int64_t c = 0; c < chunk.width(); c += kFloats) {
            const Floats value = Load(sums + c) + Load(bias + c);
            Store(z + c, value);
            Store(bottleneck + c, Gelu(value));
          }
          if (z_to != nullptr)
            std::memcpy(z_to + (pixel + m) * s.bottleneck + chunk.first, z, chunk.lanes * sizeof(float));
        }
      },
      [&](int64_t pixel, int count, const FloatChunk& chunk, const float* sums) {
        for (int m = 0; m < count; ++m) {
          float* row = to + (pixel + m) * s.outputs + chunk.first;
          for (int64_t c = 0; c < chunk.lanes; ++c) row[c] = sums[m * chunk.width() + c] + after[chunk.first + c];
        }
      });
  return ffi::Error::Success();
}

ffi::Error BottleneckCall(ffi::ThreadPool pool, Array x, Array kernel1, Array bias1, Array kernel2, Array bias2,
                          ArrayResult y) {
  return BottleneckForward(pool, x, kernel1, bias1, kernel2, bias2, *y, nullptr);
}

ffi::Error BottleneckKeptCall(ffi::ThreadPool pool, Array x, Array kernel1, Array bias1, Array kernel2, Array bias2,
                              ArrayResult y, ArrayResult z) {
  return BottleneckForward(pool, x, kernel1, bias1, kernel2, bias2, *y, &*z);
}

// Computes the gradients of x, kernel1, bias1 and kernel2 from g, that of y; dz and bottleneck = GELU(z) are between.
ffi::Error BottleneckGradientCall(ffi::ThreadPool pool, Array x, Array z, Array kernel1, Array kernel2, Array g,
                                  ArrayResult dx, ArrayResult dkernel1, ArrayResult dbias1, ArrayResult dkernel2,
                                  ArrayResult dz, ArrayResult bottleneck) {
  Bottleneck s;
  if (!s.Set(g, kernel1, kernel2) || !HaveCount({g}, s.pixels * s.outputs) ||
      !HaveCount({z, *dz, *bottleneck}, s.pixels * s.bottleneck) || !HaveCount({x, *dx}, s.pixels * s.inputs) ||
      !HaveCount({*dbias1}, s.bottleneck) || !HaveCount({*dkernel1}, s.inputs * s.bottleneck) ||
      !HaveCount({*dkernel2}, s.bottleneck * s.outputs))
    return Invalid("shapes of a bottleneck's gradient do not fit");
  float *dx_to = dx->typed_data(), *dz_to = dz->typed_data(), *bottleneck_to = bottleneck->typed_data();
  const float* z_from = z.typed_data();
  const Blocks blocks(s.pixels, s.outputs, s.bottleneck, pool.num_threads());
  auto sums_of_dz = Allocate<float>((blocks.count + 1) * blocks.step);
  std::fill(sums_of_dz.get(), sums_of_dz.get() + blocks.count * blocks.step, 0.0f);
  MultiplyTwice(
      pool, blocks, g.typed_data(), {kernel2.typed_data(), s.outputs, s.bottleneck, true},
      {kernel1.typed_data(), s.bottleneck, s.inputs, true},
      [&](int64_t block, int64_t pixel, int count, const FloatChunk& chunk, const float* sums, float* own) {
        float* total = sums_of_dz.get() + block * blocks.step + chunk.first;
        for (int m = 0; m < count; ++m, sums += chunk.width(), own += blocks.step) {
          const int64_t at = (pixel + m) * s.bottleneck + chunk.first;
          for (int64_t c = 0; c < chunk.lanes; c += kFloats) {
            const int64_t lanes = std::min<int64_t>(kFloats, chunk.lanes - c);
            Floats value, z_value{};
            std::memcpy(&z_value, z_from + at + c, lanes * sizeof(float));
            const Floats gradient = Load(sums + c) * GeluDerivative(z_value, &value);
            Store(own + c, gradient);
            std::memcpy(dz_to + at + c, &gradient, lanes * sizeof(float));
            std::memcpy(bottleneck_to + at + c, &value, lanes * sizeof(float));
            Store(total + c, Load(total + c) + gradient);
          }
        }
      },
      [&](int64_t pixel, int count, const FloatChunk& chunk, const float* sums) {
        for (int m = 0; m < count; ++m)
          std::memcpy(dx_to + (pixel + m) * s.inputs + chunk.first, sums + m * chunk.width(),
                      chunk.lanes * sizeof(float));
      });
  float* total = sums_of_dz.get() + blocks.count * blocks.step;
  AddRows(sums_of_dz.get(), blocks.count, blocks.step, total);
  std::memcpy(dbias1->typed_data(), total, s.bottleneck * sizeof(float));
  MultiplyOverPixels(pool, s.pixels, x.typed_data(), s.inputs, dz_to, s.bottleneck, dkernel1->typed_data());
  MultiplyOverPixels(pool, s.pixels, bottleneck_to, s.bottleneck, g.typed_data(), s.outputs, dkernel2->typed_data());
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)  // everything else is hidden and can be inlined
// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetDepthwiseNorm, DepthwiseNormCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetDepthwiseNormKept, DepthwiseNormKeptCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetDepthwiseNormGradient, DepthwiseNormGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Attr<double>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetBottleneck, BottleneckCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetBottleneckKept, BottleneckKeptCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetBottleneckGradient, BottleneckGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>().Arg<Array>()
        .Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>().Ret<Array>());
// clang-format on

#pragma GCC visibility pop

}  // namespace densenet_jax
