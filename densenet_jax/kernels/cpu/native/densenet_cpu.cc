// 2-D convolutions of float32 or float64 [b, h, w, c] maps for XLA's CPU backend: outputs, input gradients, kernel
// gradients. See ../library.py for the contract.
//
// An output tile of kTileRows pixels by up to two vectors of channels stays in registers while the sum runs over the
// window: one broadcast input value meets kVectors loaded weights. A window's row is contiguous in memory (its pixels
// are neighbors, its channels innermost), so the sum is kernel_height runs of kernel_width * channels values, whatever
// the kernel's size. Borders are zeros in a copy of the few input rows at hand, which stays in cache.

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "input_rows.h"
#include "kernel_gradient.h"
#include "outputs.h"
#include "pool_gradient.h"
#include "sizes.h"
#include "weights.h"
#include "xla/ffi/api/ffi.h"

namespace densenet_jax {
namespace {

using Shape = ffi::Span<const int64_t>;

ffi::Error Invalid(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

// The sizes of a convolution of the first `channels` channels of maps x; false where they are none of its output's.
bool Fit(Sizes& s, Shape x, int64_t channels, Shape y, int64_t kernel_height, int64_t kernel_width, int64_t stride,
         int64_t padding) {
  if (x.size() != 4 || y.size() != 4 || stride < 1 || padding < 0 || channels > x[3]) return false;
  if (x[0] < 0 || std::min({x[1], x[2], channels, y[1], y[2], y[3], kernel_height, kernel_width}) < 1) return false;
  s = {x[0], x[1], x[2], channels, y[1], y[2], y[3], kernel_height, kernel_width, stride, padding};
  return y[0] == s.batch && s.out_height == (s.height + 2 * padding - kernel_height) / stride + 1 &&
         s.out_width == (s.width + 2 * padding - kernel_width) / stride + 1;
}

// Of a reader's scale and bias, and of the mean and reciprocal deviation of what it reads, which are empty where that is
// normalized already.
bool FitReader(Shape x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias) {
  const auto channels = scale.element_count();
  return x.size() == 4 && scale.dimensions().size() == 1 && channels > 0 && bias.element_count() == channels &&
         (mean.element_count() == channels || mean.element_count() == 0) &&
         reciprocal.element_count() == mean.element_count() && static_cast<int64_t>(channels) <= x[3];
}

// Cuts sizes of a convolution in groups into those of each block of so many groups; 0 where it can't be cut so.
int64_t CutIntoBlocks(Sizes& s, Shape kernel, int64_t groups, int64_t together) {
  if (together < 1 || groups < together || groups % together || kernel[3] % groups) return 0;
  const int64_t blocks = groups / together;
  s.channels /= blocks, s.out_channels /= blocks;
  return blocks;
}

template <typename T>
Source<T> Plain(ffi::AnyBuffer x) {
  return {x.typed_data<T>(), nullptr, nullptr, nullptr, nullptr, x.dimensions()[3]};
}

template <typename T>
Source<T> Read(ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale,
               ffi::AnyBuffer bias) {
  const bool normalizes = mean.element_count() > 0;
  return {x.typed_data<T>(), normalizes ? mean.typed_data<T>() : nullptr,
          normalizes ? reciprocal.typed_data<T>() : nullptr, scale.typed_data<T>(), bias.typed_data<T>(),
          x.dimensions()[3]};
}

// Calls run with a zero of the buffers' type, which must be that of all of them.
template <typename F>
ffi::Error ForType(std::initializer_list<ffi::AnyBuffer> buffers, F run) {
  const auto type = buffers.begin()->element_type();
  for (const ffi::AnyBuffer& buffer : buffers)
    if (buffer.element_type() != type) return Invalid("operands of different types");
  if (type == ffi::F32) {
    run(float{});
  } else if (type == ffi::F64) {
    run(double{});
  } else {
    return Invalid("expected float32 or float64");
  }
  return ffi::Error::Success();
}

// y = x convolved with w, in groups of which so many are taken together; transposed: x is a gradient of the output and y
// that of the input, stride 1.
ffi::Error OutputCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                      int64_t stride, int64_t padding, bool transposed, int64_t groups, int64_t together) {
  const Shape k = w.dimensions(), to = y->dimensions();
  Sizes s;
  if (k.size() != 4 ||
      !Fit(s, x.dimensions(), transposed ? k[3] : groups * k[2], to, k[0], k[1], stride, padding) ||
      x.dimensions()[3] != s.channels || s.out_channels != (transposed ? groups * k[2] : k[3]))
    return Invalid("shapes of a convolution do not fit");
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a convolution do not fit");
  return ForType({x, w, *y}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, transposed};
    Output<T>(pool, s, blocks, Plain<T>(x), kernel, y->typed_data<T>());
  });
}

// dw: the gradient of the kernel, from the input x and the output's gradient g.
ffi::Error KernelGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dw,
                              int64_t stride, int64_t padding, int64_t groups, int64_t together) {
  const Shape k = dw->dimensions();
  Sizes s;
  if (k.size() != 4 || !Fit(s, x.dimensions(), groups * k[2], g.dimensions(), k[0], k[1], stride, padding) ||
      x.dimensions()[3] != s.channels || k[3] != s.out_channels)
    return Invalid("shapes of a convolution's gradient do not fit");
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a convolution's gradient do not fit");
  return ForType({x, g, *dw}, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, blocks, together, Plain<T>(x), g.typed_data<T>(), dw->typed_data<T>());
  });
}

// The sizes of a reader of the first channels of x, as many as scale has; 0 blocks where the shapes do not fit.
int64_t FitRead(Sizes& s, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale,
                ffi::AnyBuffer bias, Shape kernel, Shape y, int64_t stride, int64_t padding, int64_t groups,
                int64_t together) {
  if (!FitReader(x.dimensions(), mean, reciprocal, scale, bias) || kernel.size() != 4 ||
      !Fit(s, x.dimensions(), groups * kernel[2], y, kernel[0], kernel[1], stride, padding) ||
      kernel[3] != s.out_channels || static_cast<int64_t>(scale.element_count()) != s.channels)
    return 0;
  return CutIntoBlocks(s, kernel, groups, together);
}

// y = relu(scale * x^ + bias) convolved with w, of the first channels of x, as many as scale has.
ffi::Error ReadCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                    ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                    int64_t stride, int64_t padding, int64_t groups, int64_t together) {
  const Shape k = w.dimensions();
  Sizes s;
  const int64_t blocks =
      FitRead(s, x, mean, reciprocal, scale, bias, k, y->dimensions(), stride, padding, groups, together);
  if (blocks == 0) return Invalid("shapes of a reader do not fit");
  return ForType({x, mean, reciprocal, scale, bias, w, *y}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, false};
    Output<T>(pool, s, blocks, Read<T>(x, mean, reciprocal, scale, bias), kernel, y->typed_data<T>());
  });
}

// The same with the sums of y - shift and of its square; with kAdd y holds what is added to it.
template <bool kAdd>
ffi::Error ReadMomentsOf(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                         ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer shift,
                         ffi::AnyBuffer y, ffi::AnyBuffer sum, ffi::AnyBuffer square, int64_t stride, int64_t padding,
                         int64_t groups, int64_t together) {
  const Shape k = w.dimensions();
  Sizes s;
  const int64_t blocks =
      FitRead(s, x, mean, reciprocal, scale, bias, k, y.dimensions(), stride, padding, groups, together);
  const auto outputs = static_cast<size_t>(blocks * s.out_channels);
  if (blocks == 0 || shift.element_count() != outputs || sum.element_count() != outputs ||
      square.element_count() != outputs)
    return Invalid("shapes of a reader with moments do not fit");
  return ForType({x, mean, reciprocal, scale, bias, w, shift, y, sum, square}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, false};
    OutputWithMoments<kAdd, T>(pool, s, blocks, Read<T>(x, mean, reciprocal, scale, bias), kernel,
                               shift.typed_data<T>(), y.typed_data<T>(), sum.typed_data<T>(), square.typed_data<T>());
  });
}

ffi::Error ReadMomentsCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                           ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer shift,
                           ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> sum,
                           ffi::Result<ffi::AnyBuffer> square, int64_t stride, int64_t padding, int64_t groups,
                           int64_t together) {
  return ReadMomentsOf<false>(pool, x, mean, reciprocal, scale, bias, w, shift, *y, *sum, *square, stride, padding,
                              groups, together);
}

// The same, added to total, whose memory y is.
ffi::Error AddReadMomentsCall(ffi::ThreadPool pool, ffi::AnyBuffer total, ffi::AnyBuffer x, ffi::AnyBuffer mean,
                              ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w,
                              ffi::AnyBuffer shift, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> sum,
                              ffi::Result<ffi::AnyBuffer> square, int64_t stride, int64_t padding, int64_t groups,
                              int64_t together) {
  if (total.untyped_data() != y->untyped_data()) return Invalid("a sum of outputs is not added to in place");
  return ReadMomentsOf<true>(pool, x, mean, reciprocal, scale, bias, w, shift, *y, *sum, *square, stride, padding,
                             groups, together);
}

// The gradients of the x^, scale and bias of a reader at stride 1, given g, that of its output; padding is the
// transposed convolution's. With kAdd dx has all of x's channels and holds what the gradient is added to.
template <bool kAdd>
ffi::Error ReadGradientOf(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                          ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer g,
                          ffi::AnyBuffer dx, ffi::AnyBuffer dscale, ffi::AnyBuffer dbias, int64_t padding,
                          int64_t groups, int64_t together) {
  const Shape k = w.dimensions(), to = dx.dimensions();
  Sizes s;
  if (!FitReader(x.dimensions(), mean, reciprocal, scale, bias) || k.size() != 4 || to.size() != 4 ||
      !Fit(s, g.dimensions(), k[3], to, k[0], k[1], 1, padding) || g.dimensions()[3] != s.channels ||
      groups * k[2] > to[3] || (!kAdd && groups * k[2] != to[3]) ||
      static_cast<int64_t>(scale.element_count()) != groups * k[2] ||
      x.element_count() / x.dimensions()[3] != dx.element_count() / to[3] ||
      dscale.element_count() != scale.element_count() || dbias.element_count() != scale.element_count())
    return Invalid("shapes of a reader's gradient do not fit");
  s.out_channels = groups * k[2];
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a reader's gradient do not fit");
  return ForType({x, mean, reciprocal, scale, bias, w, g, dx, dscale, dbias}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, true};
    ReadGradient<kAdd, T>(pool, s, blocks, Plain<T>(g), kernel, Read<T>(x, mean, reciprocal, scale, bias),
                          dx.typed_data<T>(), to[3], dscale.typed_data<T>(), dbias.typed_data<T>());
  });
}

ffi::Error ReadGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean, ffi::AnyBuffer reciprocal,
                            ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w, ffi::AnyBuffer g,
                            ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                            ffi::Result<ffi::AnyBuffer> dbias, int64_t padding, int64_t groups, int64_t together) {
  return ReadGradientOf<false>(pool, x, mean, reciprocal, scale, bias, w, g, *dx, *dscale, *dbias, padding, groups,
                               together);
}

// The same, added to the first channels of total, whose memory dx is.
ffi::Error AddReadGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer total, ffi::AnyBuffer x, ffi::AnyBuffer mean,
                               ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer w,
                               ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                               ffi::Result<ffi::AnyBuffer> dbias, int64_t padding, int64_t groups, int64_t together) {
  if (total.untyped_data() != dx->untyped_data()) return Invalid("a sum of gradients is not added to in place");
  return ReadGradientOf<true>(pool, x, mean, reciprocal, scale, bias, w, g, *dx, *dscale, *dbias, padding, groups,
                              together);
}

// The gradient of ReadCall's w.
ffi::Error ReadKernelGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer mean,
                                  ffi::AnyBuffer reciprocal, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                                  ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dw, int64_t stride, int64_t padding,
                                  int64_t groups, int64_t together) {
  Sizes s;
  const int64_t blocks = FitRead(s, x, mean, reciprocal, scale, bias, dw->dimensions(), g.dimensions(), stride,
                                 padding, groups, together);
  if (blocks == 0) return Invalid("shapes of a reader's kernel gradient do not fit");
  return ForType({x, mean, reciprocal, scale, bias, g, *dw}, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, blocks, together, Read<T>(x, mean, reciprocal, scale, bias), g.typed_data<T>(),
                      dw->typed_data<T>());
  });
}

// The gradient of x, given g, that of its windows' maxima; windows of window x window, padded on every side.
ffi::Error PoolGradientCall(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dx,
                            int64_t window, int64_t stride, int64_t padding) {
  Sizes s;
  const Shape shape = x.dimensions();
  if (shape.size() != 4 || padding >= window || dx->element_count() != x.element_count() ||
      !Fit(s, shape, shape[3], g.dimensions(), window, window, stride, padding) || s.out_channels != s.channels)
    return Invalid("shapes of a pooling's gradient do not fit");
  return ForType({x, g, *dx}, [&](auto zero) {
    using T = decltype(zero);
    PoolGradient<T>(pool, s, x.typed_data<T>(), g.typed_data<T>(), dx->typed_data<T>());
  });
}

using Buffer = ffi::AnyBuffer;

}  // namespace

#pragma GCC visibility push(default)  // all else is hidden, for the compiler to inline as it sees fit
// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetConvolution, OutputCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<bool>("transposed")
        .Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetKernelGradient, KernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetRead, ReadCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetReadMoments, ReadMomentsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetAddReadMoments, AddReadMomentsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetReadGradient, ReadGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetAddReadGradient, AddReadGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetReadKernelGradient, ReadKernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetPoolGradient, PoolGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("window").Attr<int64_t>("stride").Attr<int64_t>("padding"));
// clang-format on

#pragma GCC visibility pop

}  // namespace densenet_jax
