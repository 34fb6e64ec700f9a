// 2-D convolutions of float32 or float64 feature maps [b, h, w, c] for XLA's CPU backend: outputs, input gradients and
// kernel gradients, with norm and ReLU before them where wanted. ../library.py registers the handlers at the end.
//
// An output tile of kTileRows pixels by up to two vectors of channels stays in registers while the sum runs over the
// window: one broadcast input value is multiplied with kVectors vectors of weights. A window's row is contiguous in
// memory (its pixels are neighbors, its channels innermost), so the sum is kernel_height runs of kernel_width *
// channels values, whatever the kernel's size. Borders are zeros in a copy of the few input rows at hand, which stays
// in cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "block.h"
#include "elementwise.h"
#include "input_rows.h"
#include "kernel_gradient.h"
#include "outputs.h"
#include "pool_gradient.h"
#include "sizes.h"
#include "stem.h"
#include "weights.h"
#include "xla/ffi/api/ffi.h"

namespace densenet_jax {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Shape = ffi::Span<const int64_t>;

ffi::Error Invalid(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

// Whether two feature maps differ in their channels at most.
bool HaveSamePixels(Shape a, Shape b) { return std::equal(a.begin(), a.begin() + 3, b.begin()); }

// Sets the sizes of a convolution of the first `channels` channels of x; false if y can't be its output.
bool SetSizes(Sizes& s, Shape x, int64_t channels, Shape y, int64_t kernel_height, int64_t kernel_width, int64_t stride,
              int64_t padding) {
  if (x.size() != 4 || y.size() != 4 || stride < 1 || padding < 0 || channels > x[3]) return false;
  if (x[0] < 0 || std::min({x[1], x[2], channels, y[1], y[2], y[3], kernel_height, kernel_width}) < 1) return false;
  s = {x[0], x[1], x[2], channels, y[1], y[2], y[3], kernel_height, kernel_width, stride, padding};
  return y[0] == s.batch && s.out_height == (s.height + 2 * padding - kernel_height) / stride + 1 &&
         s.out_width == (s.width + 2 * padding - kernel_width) / stride + 1;
}

// Divides a grouped convolution into blocks of `together` groups, sets s to the sizes of one block and returns the
// number of blocks; 0 if the channels don't divide.
int64_t CutIntoBlocks(Sizes& s, Shape kernel, int64_t groups, int64_t together) {
  if (together < 1 || groups < together || groups % together || kernel[3] % groups) return 0;
  const int64_t blocks = groups / together;
  s.channels /= blocks, s.out_channels /= blocks;
  return blocks;
}

// Returns a buffer's values; null if it has none.
template <typename T>
const T* OrNull(Buffer x) {
  return x.element_count() > 0 ? x.typed_data<T>() : nullptr;
}

template <typename T>
Source<T> PlainSource(Buffer x) {
  return {x.typed_data<T>(), nullptr, nullptr, nullptr, nullptr, x.dimensions()[3]};
}

// Both maps side by side.
template <typename T>
Source<T> PlainSource(Buffer first, Buffer second) {
  Source<T> source = PlainSource<T>(first);
  source.other = second.typed_data<T>(), source.other_step = second.dimensions()[3], source.split = source.step;
  return source;
}

// Operands of relu(scale * x_hat + bias) of the first channels of x, as many as scale has. x_hat is (x - mean) * rstd,
// or x itself where mean and rstd are empty.
struct NormRelu {
  Buffer x, mean, rstd, scale, bias;

  int64_t channels() const { return static_cast<int64_t>(scale.element_count()); }
  bool IsValid() const {
    const auto channels = scale.element_count();
    return x.dimensions().size() == 4 && scale.dimensions().size() == 1 && channels > 0 &&
           bias.element_count() == channels && (mean.element_count() == channels || mean.element_count() == 0) &&
           rstd.element_count() == mean.element_count() && static_cast<int64_t>(channels) <= x.dimensions()[3];
  }
  // Sets the sizes of its convolution and returns the number of blocks; 0 if the shapes don't fit.
  int64_t SetSizes(Sizes& s, Shape kernel, Shape y, int64_t stride, int64_t padding, int64_t groups,
                   int64_t together) const {
    if (!IsValid() || kernel.size() != 4 ||
        !densenet_jax::SetSizes(s, x.dimensions(), groups * kernel[2], y, kernel[0], kernel[1], stride, padding) ||
        kernel[3] != s.out_channels || channels() != s.channels)
      return 0;
    return CutIntoBlocks(s, kernel, groups, together);
  }
  template <typename T>
  Source<T> source() const {
    return {x.typed_data<T>(), OrNull<T>(mean), OrNull<T>(rstd), scale.typed_data<T>(), bias.typed_data<T>(),
            x.dimensions()[3]};
  }
};

// Calls run with a zero of the buffers' type; an error if they differ in type.
template <typename F>
ffi::Error ForType(std::initializer_list<Buffer> buffers, F run) {
  const auto type = buffers.begin()->element_type();
  for (const Buffer& buffer : buffers)
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

// Computes y, x convolved with w, `together` groups at a time. Transposed, at stride 1: x is a gradient of the output
// and y that of the input.
ffi::Error ConvolutionCall(ffi::ThreadPool pool, Buffer x, Buffer w, Result y, int64_t stride, int64_t padding,
                           bool transposed, int64_t groups, int64_t together) {
  const Shape k = w.dimensions(), to = y->dimensions();
  Sizes s;
  if (k.size() != 4 ||
      !SetSizes(s, x.dimensions(), transposed ? k[3] : groups * k[2], to, k[0], k[1], stride, padding) ||
      x.dimensions()[3] != s.channels || s.out_channels != (transposed ? groups * k[2] : k[3]))
    return Invalid("shapes of a convolution do not fit");
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a convolution do not fit");
  return ForType({x, w, *y}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, transposed};
    Output<T>(pool, s, blocks, PlainSource<T>(x), kernel, y->typed_data<T>());
  });
}

// Computes dw, the gradient of the kernel, from the input x and the output's gradient g.
ffi::Error KernelGradientCall(ffi::ThreadPool pool, Buffer x, Buffer g, Result dw, int64_t stride, int64_t padding,
                              int64_t groups, int64_t together) {
  const Shape k = dw->dimensions();
  Sizes s;
  if (k.size() != 4 || !SetSizes(s, x.dimensions(), groups * k[2], g.dimensions(), k[0], k[1], stride, padding) ||
      x.dimensions()[3] != s.channels || k[3] != s.out_channels)
    return Invalid("shapes of a convolution's gradient do not fit");
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a convolution's gradient do not fit");
  return ForType({x, g, *dw}, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, blocks, together, PlainSource<T>(x), PlainSource<T>(g), dw->typed_data<T>());
  });
}

// Computes y = relu(scale * x_hat + bias), convolved with w.
ffi::Error NormReluConvCall(ffi::ThreadPool pool, Buffer x, Buffer mean, Buffer rstd, Buffer scale, Buffer bias,
                            Buffer w, Result y, int64_t stride, int64_t padding, int64_t groups, int64_t together) {
  const NormRelu input{x, mean, rstd, scale, bias};
  const Shape k = w.dimensions();
  Sizes s;
  const int64_t blocks = input.SetSizes(s, k, y->dimensions(), stride, padding, groups, together);
  if (blocks == 0) return Invalid("shapes of a norm_relu_conv do not fit");
  return ForType({x, mean, rstd, scale, bias, w, *y}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, false};
    Output<T>(pool, s, blocks, input.source<T>(), kernel, y->typed_data<T>());
  });
}

// Computes norm_relu_conv, and the sums of y - shift and of its square over all pixels.
ffi::Error NormReluConvSumsCall(ffi::ThreadPool pool, Buffer x, Buffer mean, Buffer rstd, Buffer scale, Buffer bias,
                                Buffer w, Buffer shift, Result y, Result sum, Result square, int64_t stride,
                                int64_t padding, int64_t groups, int64_t together) {
  const NormRelu input{x, mean, rstd, scale, bias};
  const Shape k = w.dimensions();
  Sizes s;
  const int64_t blocks = input.SetSizes(s, k, y->dimensions(), stride, padding, groups, together);
  const auto outputs = static_cast<size_t>(blocks * s.out_channels);
  if (blocks == 0 || shift.element_count() != outputs || sum->element_count() != outputs ||
      square->element_count() != outputs)
    return Invalid("shapes of a norm_relu_conv with sums do not fit");
  return ForType({x, mean, rstd, scale, bias, w, shift, *y, *sum, *square}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, false};
    const Destination<T> to{y->typed_data<T>(), k[3]};
    OutputWithSums<T>(pool, s, blocks, input.source<T>(), kernel, shift.typed_data<T>(), to, sum->typed_data<T>(),
                      square->typed_data<T>());
  });
}

// Computes the gradients of x_hat, scale and bias of a norm_relu_conv at stride 1 from g, the gradient of its output;
// padding is that of the transposed convolution. With kAdd, dx has all of x's channels and x_hat's gradient is added.
template <bool kAdd>
ffi::Error NormReluConvGradients(ffi::ThreadPool& pool, const NormRelu& input, Buffer w, Buffer g, Buffer dx,
                                 Buffer dscale, Buffer dbias, int64_t padding, int64_t groups, int64_t together) {
  const auto& [x, mean, rstd, scale, bias] = input;
  const Shape k = w.dimensions(), to = dx.dimensions();
  Sizes s;
  if (!input.IsValid() || k.size() != 4 || to.size() != 4 ||
      !SetSizes(s, g.dimensions(), k[3], to, k[0], k[1], 1, padding) || g.dimensions()[3] != s.channels ||
      groups * k[2] > to[3] || (!kAdd && groups * k[2] != to[3]) || input.channels() != groups * k[2] ||
      x.element_count() / x.dimensions()[3] != dx.element_count() / to[3] ||
      dscale.element_count() != scale.element_count() || dbias.element_count() != scale.element_count())
    return Invalid("shapes of a norm_relu_conv's gradient do not fit");
  s.out_channels = groups * k[2];
  const int64_t blocks = CutIntoBlocks(s, k, groups, together);
  if (blocks == 0) return Invalid("groups of a norm_relu_conv's gradient do not fit");
  return ForType({x, mean, rstd, scale, bias, w, g, dx, dscale, dbias}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), k[3], 0, together, true};
    InputGradients<kAdd, T>(pool, s, blocks, PlainSource<T>(g), kernel, input.source<T>(), dx.typed_data<T>(), to[3],
                            dscale.typed_data<T>(), dbias.typed_data<T>());
  });
}

ffi::Error NormReluConvGradientCall(ffi::ThreadPool pool, Buffer x, Buffer mean, Buffer rstd, Buffer scale, Buffer bias,
                                    Buffer w, Buffer g, Result dx, Result dscale, Result dbias, int64_t padding,
                                    int64_t groups, int64_t together) {
  return NormReluConvGradients<false>(pool, {x, mean, rstd, scale, bias}, w, g, *dx, *dscale, *dbias, padding, groups,
                                      together);
}

// Adds to the first channels of total in place: dx must be in total's memory.
ffi::Error AddNormReluConvGradientCall(ffi::ThreadPool pool, Buffer total, Buffer x, Buffer mean, Buffer rstd,
                                       Buffer scale, Buffer bias, Buffer w, Buffer g, Result dx, Result dscale,
                                       Result dbias, int64_t padding, int64_t groups, int64_t together) {
  if (total.untyped_data() != dx->untyped_data()) return Invalid("a sum of gradients is not added to in place");
  return NormReluConvGradients<true>(pool, {x, mean, rstd, scale, bias}, w, g, *dx, *dscale, *dbias, padding, groups,
                                     together);
}

// Computes dw, the gradient of NormReluConvCall's w.
ffi::Error NormReluConvKernelGradientCall(ffi::ThreadPool pool, Buffer x, Buffer mean, Buffer rstd, Buffer scale,
                                          Buffer bias, Buffer g, Result dw, int64_t stride, int64_t padding,
                                          int64_t groups, int64_t together) {
  const NormRelu input{x, mean, rstd, scale, bias};
  Sizes s;
  const int64_t blocks = input.SetSizes(s, dw->dimensions(), g.dimensions(), stride, padding, groups, together);
  if (blocks == 0) return Invalid("shapes of a norm_relu_conv's kernel gradient do not fit");
  return ForType({x, mean, rstd, scale, bias, g, *dw}, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, blocks, together, input.source<T>(), PlainSource<T>(g), dw->typed_data<T>());
  });
}

// Operands of relu(scale * x_hat + bias) of all channels of x and the first ones of `other` side by side, as many as
// scale has. x_hat is (x - mean) * rstd, or x itself where mean and rstd are empty; `other` holds x_hat.
struct Joined {
  Buffer x, other, mean, rstd, scale, bias;

  // Sets the sizes of a 1x1 convolution; false if its kernel or its output don't fit.
  bool SetSizes(Sizes& s, Shape kernel, Shape y) const {
    const Shape first = x.dimensions(), second = other.dimensions();
    const auto channels = static_cast<int64_t>(scale.element_count());
    if (first.size() != 4 || second.size() != 4 || kernel.size() != 4 || bias.element_count() != scale.element_count())
      return false;
    const auto normalized = static_cast<int64_t>(mean.element_count());
    if ((normalized != 0 && normalized != first[3]) || mean.element_count() != rstd.element_count()) return false;
    if (!HaveSamePixels(first, second)) return false;
    if (channels <= first[3] || channels > first[3] + second[3] || kernel[2] != channels) return false;
    s = {first[0], first[1], first[2], channels, first[1], first[2], kernel[3], 1, 1, 1, 0};
    return kernel[0] == 1 && kernel[1] == 1 && kernel[3] > 0 && y.size() == 4 && y[0] == first[0] &&
           y[1] == first[1] && y[2] == first[2] && y[3] == kernel[3];
  }
  template <typename T>
  Source<T> source() const {
    const int64_t split = x.dimensions()[3];
    return {x.typed_data<T>(), OrNull<T>(mean), OrNull<T>(rstd), scale.typed_data<T>(), bias.typed_data<T>(), split,
            other.typed_data<T>(), other.dimensions()[3], split};
  }
};

// Computes y = relu(scale * x_hat + bias) of the joined channels, convolved with w, and sums as NormReluConvSums.
ffi::Error JoinedConvSumsCall(ffi::ThreadPool pool, Buffer x, Buffer other, Buffer mean, Buffer rstd, Buffer scale,
                              Buffer bias, Buffer w, Buffer shift, Result y, Result sum, Result square) {
  const Joined input{x, other, mean, rstd, scale, bias};
  Sizes s;
  const bool fits = input.SetSizes(s, w.dimensions(), y->dimensions());
  for (const Buffer& one : {shift, *sum, *square})
    if (!fits || static_cast<int64_t>(one.element_count()) != s.out_channels)
      return Invalid("shapes of a joined norm_relu_conv do not fit");
  return ForType({x, other, mean, rstd, scale, bias, w, shift, *y, *sum, *square}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), s.out_channels, 0, 1, false};
    const Destination<T> to{y->typed_data<T>(), s.out_channels};
    OutputWithSums<T>(pool, s, 1, input.source<T>(), kernel, shift.typed_data<T>(), to, sum->typed_data<T>(),
                      square->typed_data<T>());
  });
}

// Computes the gradients of x_hat, scale and bias from g, that of y, and adds that of `other` to total in place.
ffi::Error JoinedConvGradientCall(ffi::ThreadPool pool, Buffer total, Buffer x, Buffer other, Buffer mean, Buffer rstd,
                                  Buffer scale, Buffer bias, Buffer w, Buffer g, Result added, Result dx, Result dscale,
                                  Result dbias) {
  const Joined input{x, other, mean, rstd, scale, bias};
  Sizes s;
  if (!input.SetSizes(s, w.dimensions(), g.dimensions()) || total.dimensions().size() != 4 ||
      total.untyped_data() != added->untyped_data() || dx->element_count() != x.element_count() ||
      total.dimensions()[3] < s.channels - x.dimensions()[3] ||
      static_cast<int64_t>(total.element_count()) != s.batch * s.height * s.width * total.dimensions()[3] ||
      dscale->element_count() != scale.element_count() || dbias->element_count() != scale.element_count())
    return Invalid("shapes of a joined norm_relu_conv's gradient do not fit");
  std::swap(s.channels, s.out_channels);
  return ForType({total, x, other, mean, rstd, scale, bias, w, g, *dx, *dscale, *dbias}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), s.channels, 0, 1, true};
    InputGradients<false, T>(pool, s, 1, PlainSource<T>(g), kernel, input.source<T>(), dx->typed_data<T>(),
                             x.dimensions()[3], dscale->typed_data<T>(), dbias->typed_data<T>(),
                             added->typed_data<T>(), total.dimensions()[3]);
  });
}

// Computes dw, the gradient of JoinedConvSumsCall's w.
ffi::Error JoinedConvKernelGradientCall(ffi::ThreadPool pool, Buffer x, Buffer other, Buffer mean, Buffer rstd,
                                        Buffer scale, Buffer bias, Buffer g, Result dw) {
  const Joined input{x, other, mean, rstd, scale, bias};
  Sizes s;
  if (!input.SetSizes(s, dw->dimensions(), g.dimensions()))
    return Invalid("shapes of a joined norm_relu_conv's kernel gradient do not fit");
  return ForType({x, other, mean, rstd, scale, bias, g, *dw}, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, 1, 1, input.source<T>(), PlainSource<T>(g), dw->typed_data<T>());
  });
}

// A 1x1 norm_relu_conv onto two maps: the first ones of its outputs, and the others.
struct Forked {
  NormRelu input;
  Buffer first, second;

  // Sets the sizes for a kernel, float[1, 1, channels, outputs]; false if something doesn't fit.
  bool SetSizes(Sizes& s, Shape kernel) const {
    const Shape x = input.x.dimensions(), y = first.dimensions(), other = second.dimensions();
    if (!input.IsValid() || y.size() != 4 || other.size() != 4 || kernel.size() != 4) return false;
    if (!HaveSamePixels(x, y) || !HaveSamePixels(x, other)) return false;
    s = {x[0], x[1], x[2], input.channels(), x[1], x[2], y[3] + other[3], 1, 1, 1, 0};
    return kernel[0] == 1 && kernel[1] == 1 && kernel[2] == s.channels && kernel[3] == s.out_channels && other[3] > 0 &&
           y[3] > 0 && y[3] % Chunk<float>::kMost == 0;
  }
};

// Computes norm_relu_conv onto y, with total added, and onto `other`, and sums as NormReluConvSumsCall.
ffi::Error ForkedConvSumsCall(ffi::ThreadPool pool, Buffer total, Buffer x, Buffer mean, Buffer rstd, Buffer scale,
                              Buffer bias, Buffer w, Buffer shift, Result y, Result other, Result sum, Result square) {
  const Forked forked{{x, mean, rstd, scale, bias}, *y, *other};
  Sizes s;
  bool fits = forked.SetSizes(s, w.dimensions()) && total.element_count() == y->element_count();
  for (const Buffer& one : {shift, *sum, *square})
    fits = fits && static_cast<int64_t>(one.element_count()) == s.out_channels;
  if (!fits) return Invalid("shapes of a forked norm_relu_conv do not fit");
  return ForType({total, x, mean, rstd, scale, bias, w, shift, *y, *other, *sum, *square}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), s.out_channels, 0, 1, false};
    const Destination<T> to{y->typed_data<T>(), s.out_channels, total.typed_data<T>(), other->typed_data<T>(),
                            y->dimensions()[3]};
    OutputWithSums<T>(pool, s, 1, forked.input.source<T>(), kernel, shift.typed_data<T>(), to, sum->typed_data<T>(),
                      square->typed_data<T>());
  });
}

// Computes the gradients of x_hat, scale and bias from those of both outputs.
ffi::Error ForkedConvGradientCall(ffi::ThreadPool pool, Buffer x, Buffer mean, Buffer rstd, Buffer scale, Buffer bias,
                                  Buffer w, Buffer g, Buffer other, Result dx, Result dscale, Result dbias) {
  const Forked forked{{x, mean, rstd, scale, bias}, g, other};
  Sizes s;
  if (!forked.SetSizes(s, w.dimensions()) || dscale->element_count() != scale.element_count() ||
      dbias->element_count() != scale.element_count() ||
      static_cast<int64_t>(dx->element_count()) != s.batch * s.height * s.width * s.channels)
    return Invalid("shapes of a forked norm_relu_conv's gradient do not fit");
  std::swap(s.channels, s.out_channels);
  return ForType({x, mean, rstd, scale, bias, w, g, other, *dx, *dscale, *dbias}, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{w.typed_data<T>(), s.channels, 0, 1, true};
    InputGradients<false, T>(pool, s, 1, PlainSource<T>(g, other), kernel, forked.input.source<T>(), dx->typed_data<T>(),
                             s.out_channels, dscale->typed_data<T>(), dbias->typed_data<T>());
  });
}

// Computes the gradient of ForkedConvSumsCall's w.
ffi::Error ForkedConvKernelGradientCall(ffi::ThreadPool pool, Buffer x, Buffer mean, Buffer rstd, Buffer scale,
                                        Buffer bias, Buffer g, Buffer other, Result dw) {
  const Forked forked{{x, mean, rstd, scale, bias}, g, other};
  Sizes s;
  if (!forked.SetSizes(s, dw->dimensions())) return Invalid("shapes of a forked kernel gradient do not fit");
  return ForType({x, mean, rstd, scale, bias, g, other, *dw}, [&](auto zero) {
    using T = decltype(zero);
    KernelGradient<T>(pool, s, 1, 1, forked.input.source<T>(), PlainSource<T>(g, other), dw->typed_data<T>());
  });
}

// Computes dx from g, the gradient of the maxima over windows of x, window x window and padded on every side.
ffi::Error PoolGradientCall(ffi::ThreadPool pool, Buffer x, Buffer g, Result dx, int64_t window, int64_t stride,
                            int64_t padding) {
  Sizes s;
  const Shape shape = x.dimensions();
  if (shape.size() != 4 || padding >= window || dx->element_count() != x.element_count() ||
      !SetSizes(s, shape, shape[3], g.dimensions(), window, window, stride, padding) || s.out_channels != s.channels)
    return Invalid("shapes of a pooling's gradient do not fit");
  return ForType({x, g, *dx}, [&](auto zero) {
    using T = decltype(zero);
    PoolGradient<T>(pool, s, x.typed_data<T>(), g.typed_data<T>(), dx->typed_data<T>());
  });
}

constexpr size_t kStepFields = 8, kStepArrays = 6, kKernel = 4;

// Returns the scale and bias of a norm by its running statistics; empty mean and var: scale and bias as they are, and
// an empty scale is 1. `folded` has room for both.
template <typename T>
std::pair<const T*, const T*> Fold(Buffer scale, Buffer bias, Buffer mean, Buffer var, double epsilon, T* folded) {
  const int64_t channels = static_cast<int64_t>(bias.element_count());
  const bool is_scaled = scale.element_count() > 0, is_folded = mean.element_count() == 0;
  if (is_scaled && is_folded) return {scale.typed_data<T>(), bias.typed_data<T>()};
  if (is_scaled)
    std::copy_n(scale.typed_data<T>(), channels, folded);
  else
    std::fill_n(folded, channels, T{1});
  std::copy_n(bias.typed_data<T>(), channels, folded + channels);
  if (!is_folded) {
    const T *means = mean.typed_data<T>(), *variances = var.typed_data<T>(), about = static_cast<T>(epsilon);
    for (int64_t c = 0; c < channels; ++c) folded[c] /= std::sqrt(variances[c] + about);
    for (int64_t c = 0; c < channels; ++c) folded[channels + c] -= means[c] * folded[c];
  }
  return {folded, folded + channels};
}

// Sets a step from its fields (../block.py's Step), the feature maps that it reads and writes, and its operands: scale,
// bias, mean, var, kernel and, for one of int8, the scales of its outputs; false if they don't fit.
template <typename T>
bool SetStep(Step<T>& step, const int64_t* fields, Buffer x, Buffer y, const Buffer* arrays, int64_t products) {
  const Buffer scale = arrays[0], bias = arrays[1], mean = arrays[2], var = arrays[3], kernel = arrays[kKernel];
  const int64_t offset = fields[2], added = fields[3], stride = fields[4], groups = fields[5];
  const Shape k = kernel.dimensions(), to = y.dimensions();
  const auto channels = bias.element_count();
  if (k.size() != 4 || to.size() != 4 || k[0] != k[1] || k[0] % 2 == 0 || groups < 1 || k[3] % groups) return false;
  const int64_t written[] = {to[0], to[1], to[2], k[3]};
  step.packed = fields[6] != 0, step.pooled = fields[7] != 0;
  const int64_t size = step.pooled ? 2 : k[0], padding = step.pooled ? 0 : k[0] / 2;
  if ((step.pooled && (k[0] != 1 || stride != 2 || groups != 1)) ||
      !SetSizes(step.sizes, x.dimensions(), groups * k[2], Shape(written, 4), size, size, stride, padding) ||
      channels != static_cast<size_t>(step.sizes.channels) || added < 0 || offset < added || added > k[3] ||
      offset + k[3] - added > to[3] || var.element_count() != mean.element_count())
    return false;
  for (const Buffer& array : {scale, mean})
    if (array.element_count() != 0 && array.element_count() != channels) return false;
  step.sizes.kernel_height = step.sizes.kernel_width = k[0];
  step.groups = groups, step.added = added, step.y_step = to[3];
  if (step.packed && (groups == 1 ? k[3] % Lanes<T>::kCount != 0 : !Grouping<T>(step).IsPackable(step))) return false;
  step.source.x = x.typed_data<T>(), step.source.step = x.dimensions()[3];
  const bool is_int8 = kernel.element_type() == ffi::S8;
  const Buffer scales = arrays[kKernel + 1];
  if (scales.element_count() != (is_int8 ? static_cast<size_t>(k[3]) : 0)) return false;
  if (is_int8 || kernel.element_type() == ffi::BF16) {
    if (groups != 1 || k[0] > 3 || k[2] % (is_int8 ? 4 : 2) || (k[0] > 1 && stride > 1)) return false;
    const int64_t fastest = is_int8 ? FastestProducts<uint8_t>() : FastestProducts<Bfloat16>();
    const auto bytes = static_cast<int64_t>(kernel.size_bytes());
    step.rounded = {kernel.untyped_data(), nullptr, std::min(products, fastest), bytes, nullptr};
    if (is_int8) step.rounded.scales = static_cast<const float*>(scales.untyped_data());
  } else {
    step.kernel = kernel.typed_data<T>();
  }
  step.total = y.typed_data<T>(), step.y = step.total + offset - added;
  return true;
}

// Computes steps one after another on feature maps: 0 is x, the others are results. The first `copied` channels of x
// are copied to the first result before.
ffi::Error BlockCall(ffi::ThreadPool pool, Buffer x, ffi::RemainingArgs arrays, ffi::RemainingRets results,
                     ffi::Span<const int64_t> steps, int64_t copied, double epsilon, int64_t products) {
  const size_t count = steps.size() / kStepFields;
  if (arrays.size() != count * kStepArrays) return Invalid("a block's operands do not fit its steps");
  std::vector<Buffer> maps{x}, operands;
  for (size_t i = 0; i < results.size(); ++i) maps.push_back(**results.get<ffi::AnyBuffer>(i));
  for (size_t i = 0; i < arrays.size(); ++i) operands.push_back(*arrays.get<ffi::AnyBuffer>(i));
  const Shape first = maps[1].dimensions(), shape = x.dimensions();
  if (copied > 0 && (shape.size() != 4 || first.size() != 4 || copied > shape[3] || copied > first[3] ||
                     !HaveSamePixels(shape, first)))
    return Invalid("a block's input does not fit its result");
  for (size_t i = 0; i < operands.size(); ++i) {
    const bool can_round = i % kStepArrays == kKernel && x.element_type() == ffi::F32;
    const ffi::DataType type = operands[i].element_type();
    const bool is_rounded = can_round && (type == ffi::BF16 || type == ffi::S8);
    if (!is_rounded && type != x.element_type() && operands[i].element_count() > 0)
      return Invalid("operands of different types");
  }
  bool fits = true;
  ffi::Error error = ForType({x, maps[1]}, [&](auto zero) {
    using T = decltype(zero);
    Team team(pool);
    if (copied > 0) {
      const int64_t pixels = first[0] * first[1] * first[2], bands = std::min<int64_t>(pixels, 4 * team.size());
      team.Run(bands, [&](int64_t band) {
        const T* from = x.typed_data<T>();
        T* to = maps[1].typed_data<T>();
        for (int64_t i = pixels * band / bands; i < pixels * (band + 1) / bands; ++i)
          std::copy_n(from + i * shape[3], copied, to + i * first[3]);
      });
    }
    size_t channels = 0;
    for (size_t i = 0; i < count; ++i) channels += operands[i * kStepArrays + 1].element_count();
    std::vector<T> folded(2 * channels);
    std::vector<Step<T>> all;
    T* norm = folded.data();
    for (size_t i = 0; i < count && fits; ++i) {
      const int64_t* fields = steps.begin() + i * kStepFields;
      const Buffer* own = operands.data() + i * kStepArrays;
      Step<T> step{};
      fits = fields[0] >= 0 && fields[1] > 0 && std::max(fields[0], fields[1]) < static_cast<int64_t>(maps.size()) &&
             SetStep(step, fields, maps[fields[0]], maps[fields[1]], own, products);
      if (!fits) break;
      std::tie(step.source.scale, step.source.bias) = Fold(own[0], own[1], own[2], own[3], epsilon, norm);
      norm += 2 * own[1].element_count();
      all.push_back(step);
    }
    for (size_t i = 0; i + 1 < all.size(); ++i) all[i].rounded.next = &all[i + 1].rounded;
    if (fits) RunSteps(team, all);
  });
  return fits ? error : Invalid("shapes of a block's step do not fit");
}

// Computes an image's first convolution, norm, ReLU and maximum with bfloat16 products.
ffi::Error StemCall(ffi::ThreadPool pool, Buffer x, Buffer kernel, Buffer scale, Buffer bias, Result y, int64_t stride,
                    int64_t products) {
  for (const Buffer& buffer : {x, kernel, scale, bias, *y})
    if (buffer.element_type() != ffi::F32) return Invalid("a stem's operands are not float32");
  const Shape from = x.dimensions(), k = kernel.dimensions(), to = y->dimensions();
  if (from.size() != 4 || k.size() != 4 || to.size() != 4 || k[0] != k[1] || k[0] % 2 == 0 || stride < 1 ||
      k[0] > kMostTaps || k[1] * k[2] > kRowInputs || std::min(from[1], from[2]) < 1)
    return Invalid("shapes of a stem do not fit");
  const int64_t out[] = {from[0], (from[1] - 1) / stride + 1, (from[2] - 1) / stride + 1, k[3]};
  const auto outputs = static_cast<size_t>(k[3]);
  Sizes s;
  if (!SetSizes(s, from, k[2], Shape(out, 4), k[0], k[1], stride, k[0] / 2) || s.channels != from[3] ||
      scale.element_count() != outputs || bias.element_count() != outputs || to[0] != out[0] || to[3] != out[3] ||
      to[1] != DivideUp(out[1], 2) || to[2] != DivideUp(out[2], 2))
    return Invalid("shapes of a stem do not fit");
  Team team(pool);
  RunStem(team, s, x.typed_data<float>(), kernel.typed_data<float>(), scale.typed_data<float>(),
          bias.typed_data<float>(), y->typed_data<float>(), std::min(products, FastestProducts<Bfloat16>()));
  return ffi::Error::Success();
}

// Computes a program of elementwise operations for many items. The operands are the vector of scalars and each item's
// inputs; the results are each item's outputs, all of one type. Of inputs and outputs that are longer than an item's
// shortest input only the front is used.
ffi::Error ElementwiseCall(ffi::ThreadPool pool, Buffer scalars, ffi::RemainingArgs inputs, ffi::RemainingRets outputs,
                           ffi::Span<const int64_t> code, ffi::Span<const int64_t> results, int64_t items) {
  if (items < 1 || inputs.size() < static_cast<size_t>(items) || inputs.size() % items || outputs.size() != items * results.size() || code.size() % 4)
    return Invalid("operands of an elementwise program do not fit");
  const int64_t in = inputs.size() / items, out = results.size();
  const Program program{code.begin(), static_cast<int64_t>(code.size() / 4), in,
                        static_cast<int64_t>(scalars.element_count()), results.begin(), out};
  if (!IsValid(program)) return Invalid("an elementwise program reads what it has not");
  bool fits = true;
  const ffi::Error error = ForType({scalars}, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Item<T>> all(items);
    for (int64_t item = 0; item < items; ++item) {
      all[item].size = std::numeric_limits<int64_t>::max();
      for (int64_t i = 0; i < in; ++i)
        all[item].size = std::min<int64_t>(all[item].size, inputs.get<Buffer>(item * in + i)->element_count());
      const auto add = [&](Buffer buffer, auto& pointers) {
        fits = fits && buffer.element_type() == scalars.element_type() &&
               static_cast<int64_t>(buffer.element_count()) >= all[item].size;
        pointers.push_back(static_cast<T*>(buffer.untyped_data()));
      };
      for (int64_t i = 0; i < in; ++i) add(*inputs.get<Buffer>(item * in + i), all[item].inputs);
      for (int64_t i = 0; i < out; ++i) add(**outputs.get<Buffer>(item * out + i), all[item].outputs);
    }
    if (fits) RunProgram<T>(pool, program, scalars.typed_data<T>(), all);
  });
  return fits ? error : Invalid("the arrays of an elementwise program differ in type or size");
}

// Computes the sum of each operand's squares.
ffi::Error SquareSumsCall(ffi::ThreadPool pool, ffi::RemainingArgs arrays, Result sums) {
  if (arrays.size() != sums->element_count()) return Invalid("one sum an array was expected");
  bool fits = true;
  const ffi::Error error = ForType({*sums}, [&](auto zero) {
    using T = decltype(zero);
    std::vector<const T*> items;
    std::vector<int64_t> sizes;
    for (size_t i = 0; i < arrays.size(); ++i) {
      const Buffer array = *arrays.get<Buffer>(i);
      fits = fits && array.element_type() == sums->element_type();
      items.push_back(static_cast<const T*>(array.untyped_data()));
      sizes.push_back(array.element_count());
    }
    if (fits) SquareSums<T>(pool, items, sizes, sums->typed_data<T>());
  });
  return fits ? error : Invalid("arrays of different types");
}

// Copies the last values of a vector, as many as y has.
ffi::Error TailCall(Buffer x, Result y) {
  const size_t size = y->element_count();
  if (size > x.element_count()) return Invalid("a vector is shorter than its tail");
  return ForType({x, *y}, [&](auto zero) {
    using T = decltype(zero);
    std::copy_n(x.typed_data<T>() + x.element_count() - size, size, y->typed_data<T>());
  });
}

// Returns an int32 that the compiler doesn't know.
ffi::Error NumberCall(ffi::Result<ffi::BufferR0<ffi::S32>> y, int64_t number) {
  *y->typed_data() = static_cast<int32_t>(number);
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)  // everything else is hidden and can be inlined
extern "C" int DensenetVectorBytes() { return kVectorBytes; }
extern "C" int DensenetBfloat16Products() { return static_cast<int>(FastestProducts<Bfloat16>()); }
extern "C" int DensenetInt8Products() { return static_cast<int>(FastestProducts<uint8_t>()); }

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetConvolution, ConvolutionCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<bool>("transposed")
        .Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetKernelGradient, KernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetNormReluConv, NormReluConvCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetNormReluConvSums, NormReluConvSumsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetNormReluConvGradient, NormReluConvGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetAddNormReluConvGradient, AddNormReluConvGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetNormReluConvKernelGradient, NormReluConvKernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("padding").Attr<int64_t>("groups").Attr<int64_t>("together"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetJoinedConvSums, JoinedConvSumsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetJoinedConvGradient, JoinedConvGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetJoinedConvKernelGradient, JoinedConvKernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetForkedConvSums, ForkedConvSumsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetForkedConvGradient, ForkedConvGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Arg<Buffer>()
        .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetForkedConvKernelGradient, ForkedConvKernelGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
        .Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetPoolGradient, PoolGradientCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("window").Attr<int64_t>("stride").Attr<int64_t>("padding"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetBlock, BlockCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().RemainingArgs().RemainingRets()
        .Attr<ffi::Span<const int64_t>>("steps").Attr<int64_t>("copied").Attr<double>("epsilon")
        .Attr<int64_t>("products"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetStem, StemCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
        .Attr<int64_t>("stride").Attr<int64_t>("products"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetElementwise, ElementwiseCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().RemainingArgs().RemainingRets()
        .Attr<ffi::Span<const int64_t>>("code").Attr<ffi::Span<const int64_t>>("results").Attr<int64_t>("items"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetSquareSums, SquareSumsCall,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(DensenetTail, TailCall, ffi::Ffi::Bind().Arg<Buffer>().Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DensenetNumber, NumberCall, ffi::Ffi::Bind().Ret<ffi::BufferR0<ffi::S32>>().Attr<int64_t>("number"));
// clang-format on

#pragma GCC visibility pop

}  // namespace densenet_jax
