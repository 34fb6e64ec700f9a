"""norm_relu_conv of two feature maps side by side on a CPU, without concatenating them or cutting the kernel.

The 1x1 convolution at a block's front reads both paths of a Dual Path Network: all channels of the first map, which it
normalizes, and the first ones of the second, which are normalized already.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu import norm_relu_conv as cpu
from densenet_jax.kernels.cpu.primitive import are_known, call_kernel, define


def is_usable(first: Array, second: Array, kernel: Array) -> bool:
    """Whether the kernels are available and support both maps and, cast to their dtype, the convolution kernel."""
    has_two = second.shape[-1] > 0 and kernel.shape[:2] == (1, 1) and kernel.shape[2] > first.shape[-1]
    return has_two and are_known(first, second) and cpu.is_usable(first, kernel)


def conv_with_sums(
    first: Float[Array, "b h w c1"],
    second: Float[Array, "b h w c2"],
    operands: cpu.Operands,
    shift: Float[Array, " o"],
) -> tuple[Float[Array, "b h w o"], Float[Array, " o"], Float[Array, " o"]]:
    """Computes `norm_relu_conv.norm_relu_conv_with_sums` of the joined maps; mean and rstd are the first map's."""
    return _sums_p.bind(first, second, *operands, shift)


def add_gradients(
    total: Float[Array, "b h w c3"],
    first: Float[Array, "b h w c1"],
    second: Float[Array, "b h w c2"],
    operands: cpu.Operands,
    g: Float[Array, "b h w o"],
) -> tuple[Float[Array, "b h w c3"], Float[Array, "b h w c1"], Array, Array, Float[Array, "1 1 c o"]]:
    """Adds the second map's gradient to total's first channels, in place if nothing else reads total.

    Returns that, and the gradients of the first map's x_hat, scale, bias and kernel.
    """
    kernel = _kernel_gradient_p.bind(first, second, *operands[:4], g)
    return *_gradient_p.bind(total, first, second, *operands, g), kernel


def _join(first: Array, second: Array, mean: Array, rstd: Array, scale: Array) -> tuple[Array, Array, Array]:
    """Returns the operands of norm_relu_conv's references: x_hat of the joined maps, and neither mean nor rstd."""
    none, width = jnp.zeros((0,), first.dtype), first.shape[-1]
    x_hat = cpu.normalize(first, mean, rstd, width)
    return jnp.concatenate([x_hat, second[..., : scale.size - width]], axis=-1), none, none


def _plain_sums(first: Array, second: Array, *operands: Array) -> tuple[Array, Array, Array]:
    return cpu.plain_norm_relu_conv_sums(*_join(first, second, *operands[:3]), *operands[2:])


def _plain_gradient(total: Array, first: Array, second: Array, *operands: Array) -> tuple[Array, ...]:
    joined = _join(first, second, *operands[:3])
    grad, grad_scale, grad_bias = cpu.plain_norm_relu_conv_gradient(*joined, *operands[2:], groups=1)
    width = first.shape[-1]
    added = total[..., : grad.shape[-1] - width] + grad[..., width:]
    return lax.dynamic_update_slice_in_dim(total, added, 0, axis=3), grad[..., :width], grad_scale, grad_bias


def _plain_kernel_gradient(first: Array, second: Array, *operands: Array) -> Array:
    joined = _join(first, second, *operands[:3])
    return cpu.plain_norm_relu_conv_kernel_gradient(*joined, *operands[2:], size=1, stride=1, groups=1)


def _sums_shapes(first: Any, second: Any, *operands: Any) -> list[tuple[int, ...]]:
    shift = operands[-1].shape
    return [(*first.shape[:3], *shift), shift, shift]


_sums_p = define("joined_conv_sums", _plain_sums, multiple_results=True, shapes=_sums_shapes)
_gradient_p = define(
    "joined_conv_gradient",
    _plain_gradient,
    functools.partial(call_kernel, "joined_conv_gradient", in_place=True),
    multiple_results=True,
    shapes=lambda total, first, second, mean, rstd, scale, *_: [total.shape, first.shape, scale.shape, scale.shape],
)
_kernel_gradient_p = define(
    "joined_conv_kernel_gradient",
    _plain_kernel_gradient,
    shapes=lambda first, second, mean, rstd, scale, bias, g: [(1, 1, *scale.shape, g.shape[3])],
)
