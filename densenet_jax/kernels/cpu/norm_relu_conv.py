"""norm_relu_conv on a CPU: relu(scale * x_hat + bias), convolved, and its gradients, in one pass each.

The compiled kernels apply norm and ReLU to a few rows at a time before the convolution, sum its output for the next
batch norm, and mask, scale and sum a gradient's rows while they are in cache: only results go through memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu.convolution import (
    dilate,
    group_sizes,
    plain_convolve,
    plain_input_gradient,
    plain_kernel_gradient,
)
from densenet_jax.kernels.cpu.primitive import are_known, call_kernel, define, have_static_sizes, is_available


class Operands(NamedTuple):
    """Parameters for the first c channels of a feature map.

    Attributes:
        mean, rstd: float[c], x_hat is (x - mean) * rstd; both empty where x is normalized already.
        scale, bias: float[c].
        kernel: float[k, k, c / groups, o], k odd; the size is kept, or divided by the stride.
    """

    mean: Array
    rstd: Array
    scale: Array
    bias: Array
    kernel: Array


def is_usable(x: Array, kernel: Array) -> bool:
    """Whether the kernels are available and support x and, cast to x's dtype, the convolution kernel."""
    square = kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    return square and is_available() and are_known(x) and have_static_sizes(kernel)


def norm_relu_conv(
    x: Float[Array, "b h w c2"], operands: Operands, *, stride: int = 1, groups: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """Computes relu(scale * x_hat + bias) of the first c channels, convolved."""
    return _forward_p.bind(x, *operands, stride=stride, groups=groups)


def norm_relu_conv_with_sums(
    x: Float[Array, "b h w c2"], operands: Operands, shift: Float[Array, " o"], *, stride: int = 1, groups: int = 1
) -> tuple[Float[Array, "b h2 w2 o"], Float[Array, " o"], Float[Array, " o"]]:
    """Returns `norm_relu_conv`, and the sums over all positions of (output - shift) and of its square."""
    return _sums_p.bind(x, *operands, shift, stride=stride, groups=groups)


def gradients(
    x: Float[Array, "b h w c2"], operands: Operands, g: Float[Array, "b h2 w2 o"], *, stride: int = 1, groups: int = 1
) -> tuple[Float[Array, "b h w c"], Float[Array, " c"], Float[Array, " c"], Float[Array, "k k i o"]]:
    """Returns the gradients of the first c channels of x_hat, of scale, bias and kernel; g is that of the output."""
    whole, (_, height, width, _) = g, x.shape
    if stride > 1:
        padding = operands.kernel.shape[0] // 2
        whole = dilate(g, operands.kernel, sizes=(height, width), stride=stride, padding=padding)
    grad_x, grad_scale, grad_bias = _gradient_p.bind(x, *operands, whole, groups=groups)
    return grad_x, grad_scale, grad_bias, _kernel_gradient(x, operands, g, stride, groups)


def add_gradients(
    total: Float[Array, "b h w c3"], x: Float[Array, "b h w c2"], operands: Operands, g: Float[Array, "b h w o"]
) -> tuple[Float[Array, "b h w c3"], Float[Array, " c"], Float[Array, " c"], Float[Array, "k k c o"]]:
    """Computes `gradients`, adding that of x_hat to total's first c channels, in place if nothing else reads total."""
    total, grad_scale, grad_bias = _add_gradient_p.bind(total, x, *operands, g, groups=1)
    return total, grad_scale, grad_bias, _kernel_gradient(x, operands, g, 1, 1)


def _kernel_gradient(x: Array, operands: Operands, g: Array, stride: int, groups: int) -> Array:
    size = operands.kernel.shape[0]
    return _kernel_gradient_p.bind(x, *operands[:4], g, size=size, stride=stride, groups=groups)


def _row(vector: Array) -> Float[Array, "1 1 1 c"]:
    return vector[None, None, None, :]


def normalize(x: Array, mean: Array, rstd: Array, channels: int) -> Array:
    """Returns x_hat of the first channels in plain JAX."""
    x = x[..., :channels]
    return (x - _row(mean)) * _row(rstd) if mean.size else x


def _affine(x: Array, mean: Array, rstd: Array, scale: Array, bias: Array) -> Array:
    return normalize(x, mean, rstd, scale.size) * _row(scale) + _row(bias)


def plain_norm_relu_conv(x: Array, *operands: Array, stride: int = 1, groups: int = 1) -> Array:
    """Computes `norm_relu_conv` in plain JAX."""
    *affine, kernel = operands
    activation = jax.nn.relu(_affine(x, *affine))
    return plain_convolve(activation, kernel, stride=stride, padding=kernel.shape[0] // 2, groups=groups)


def with_sums(y: Array, shift: Array) -> tuple[Array, Array, Array]:
    """Returns y, and the sums over all positions of y - shift and of its square, in plain JAX."""
    centered = y - _row(shift)
    return y, jnp.sum(centered, axis=(0, 1, 2)), jnp.sum(jnp.square(centered), axis=(0, 1, 2))


def plain_norm_relu_conv_sums(x: Array, *operands: Array, **options: int) -> tuple[Array, Array, Array]:
    """Computes `norm_relu_conv_with_sums` in plain JAX."""
    *conv, shift = operands
    return with_sums(plain_norm_relu_conv(x, *conv, **options), shift)


def plain_norm_relu_conv_gradient(
    x: Array, mean: Array, rstd: Array, scale: Array, bias: Array, kernel: Array, g: Array, *, groups: int
) -> tuple[Array, Array, Array]:
    """Returns the gradients of x_hat, scale and bias in plain JAX; g is that of the output."""
    padding = kernel.shape[0] // 2
    sizes = (x.shape[1], x.shape[2])
    grad_activation = plain_input_gradient(g, kernel, sizes=sizes, stride=1, padding=padding, groups=groups)
    masked = jnp.where(_affine(x, mean, rstd, scale, bias) > 0, grad_activation, 0)
    grad_scale = jnp.sum(masked * normalize(x, mean, rstd, scale.size), axis=(0, 1, 2))
    return masked * _row(scale), grad_scale, jnp.sum(masked, axis=(0, 1, 2))


def _plain_add_gradient(total: Array, x: Array, *others: Array, groups: int) -> tuple[Array, Array, Array]:
    grad_x, grad_scale, grad_bias = plain_norm_relu_conv_gradient(x, *others, groups=groups)
    added = total[..., : grad_x.shape[-1]] + grad_x
    return lax.dynamic_update_slice_in_dim(total, added, 0, axis=3), grad_scale, grad_bias


def plain_norm_relu_conv_kernel_gradient(x: Array, *operands: Array, size: int, stride: int, groups: int) -> Array:
    """Returns the gradient of the kernel in plain JAX; the last operand is that of the output."""
    *affine, g = operands
    activation = jax.nn.relu(_affine(x, *affine))
    return plain_kernel_gradient(activation, g, sizes=(size, size), stride=stride, padding=size // 2, groups=groups)


def _lower(call: str, kernel: int | None = 5, *, transposed: bool = False, in_place: bool = False) -> Any:
    """Makes a lowering rule that calls a kernel of `library._CALLS`.

    kernel is the convolution kernel's index among the operands; None: it is the result, and the last operand the
    output's gradient. A transposed call takes a gradient and has no stride.
    """

    def lowering(ctx: Any, *operands: Any, groups: int, size: int = 0, **strided: int) -> Any:
        shapes = [operand.shape for operand in ctx.avals_in]
        if kernel is None:
            features = shapes[-1][3] // groups
        else:
            size, features = shapes[kernel][0], shapes[kernel][2] if transposed else shapes[kernel][3] // groups
        attributes = {"padding": size // 2, **strided, **group_sizes(groups, features)}
        return call_kernel(call, ctx, *operands, in_place=in_place, **attributes)

    return lowering


def _output_shapes(x: Any, *operands: Any, stride: int, groups: int) -> list[tuple[int, ...]]:
    size, features = operands[4].shape[1], operands[4].shape[3]
    sides = [(side + 2 * (size // 2) - size) // stride + 1 for side in x.shape[1:3]]
    return [(x.shape[0], *sides, features), (features,), (features,)]


def _gradient_shapes(x: Any, *operands: Any, groups: int) -> list[tuple[int, ...]]:
    scale = operands[2].shape
    return [(*x.shape[:3], *scale), scale, scale]


def _add_gradient_shapes(total: Any, *operands: Any, groups: int) -> list[tuple[int, ...]]:
    return [total.shape, *_gradient_shapes(*operands, groups=groups)[1:]]


def _kernel_shapes(x: Any, *operands: Any, size: int, stride: int, groups: int) -> list[tuple[int, ...]]:
    return [(size, size, operands[2].shape[0] // groups, operands[4].shape[3])]


def _define(
    name: str, reference: Callable[..., Any], shapes: Callable[..., Any], kernel: int | None = 5, **options: Any
) -> Primitive:
    lowering = _lower(name, kernel, **options)
    return define(name, reference, lowering, multiple_results=True, shapes=shapes)


_forward_p = define(
    "norm_relu_conv",
    plain_norm_relu_conv,
    _lower("norm_relu_conv"),
    shapes=lambda *operands, **options: _output_shapes(*operands, **options)[:1],
)
_sums_p = _define("norm_relu_conv_sums", plain_norm_relu_conv_sums, _output_shapes)
_gradient_p = _define("norm_relu_conv_gradient", plain_norm_relu_conv_gradient, _gradient_shapes, transposed=True)
_add_gradient_p = _define(
    "add_norm_relu_conv_gradient", _plain_add_gradient, _add_gradient_shapes, 6, transposed=True, in_place=True
)
_kernel_gradient_p = define(
    "norm_relu_conv_kernel_gradient",
    plain_norm_relu_conv_kernel_gradient,
    _lower("norm_relu_conv_kernel_gradient", None),
    shapes=_kernel_shapes,
)
