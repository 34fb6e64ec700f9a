"""norm_relu_conv onto two feature maps on a CPU, the first added to a sum, without cutting the kernel or the output.

The 1x1 convolution at a block's end writes both paths of a Dual Path Network. One product reads its input once.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu import norm_relu_conv as cpu
from densenet_jax.kernels.cpu.primitive import are_known, define

_WIDTHS = 32  # the first map's channels are a multiple of this: a tile's outputs belong to one map


def is_usable(x: Array, first: Array, kernel: Array) -> bool:
    """Whether the kernels are available and support x, a map like the first and the convolution kernel in x's dtype."""
    width = first.shape[-1]
    fits = kernel.shape[:2] == (1, 1) and width % _WIDTHS == 0 and 0 < width < kernel.shape[-1]
    return fits and are_known(x, first) and cpu.is_usable(x, kernel)


def conv_with_sums(
    total: Float[Array, "b h w o1"], x: Float[Array, "b h w c2"], operands: cpu.Operands, shift: Float[Array, " o"]
) -> tuple[Float[Array, "b h w o1"], Float[Array, "b h w o2"], Float[Array, " o"], Float[Array, " o"]]:
    """Returns `norm_relu_conv`'s first channels with total added, the others, and sums of all of these.

    The sums, over all positions, are of (output - shift) and of its square.
    """
    return _sums_p.bind(total, x, *operands, shift)


def gradients(
    x: Float[Array, "b h w c2"],
    operands: cpu.Operands,
    first: Float[Array, "b h w o1"],
    second: Float[Array, "b h w o2"],
) -> tuple[Float[Array, "b h w c"], Float[Array, " c"], Float[Array, " c"], Float[Array, "1 1 c o"]]:
    """Returns the gradients of x_hat, scale, bias and kernel from those of both outputs."""
    return *_gradient_p.bind(x, *operands, first, second), _kernel_gradient_p.bind(x, *operands[:4], first, second)


def _plain_sums(total: Array, x: Array, *operands: Array) -> tuple[Array, ...]:
    *conv, shift = operands
    width = total.shape[-1]
    y = cpu.plain_norm_relu_conv(x, *conv)
    y, *sums = cpu.with_sums(y.at[..., :width].add(total), shift)
    return y[..., :width], y[..., width:], *sums


def _plain_gradient(x: Array, *operands: Array) -> tuple[Array, Array, Array]:
    conv, g = cpu.Operands(*operands[:5]), jnp.concatenate(operands[5:], axis=-1)
    return cpu.plain_norm_relu_conv_gradient(x, *conv, g, groups=1)


def _plain_kernel_gradient(x: Array, *operands: Array) -> Array:
    g = jnp.concatenate(operands[4:], axis=-1)
    return cpu.plain_norm_relu_conv_kernel_gradient(x, *operands[:4], g, size=1, stride=1, groups=1)


def _sums_shapes(total: Any, x: Any, *operands: Any) -> list[tuple[int, ...]]:
    shift = operands[-1].shape
    return [total.shape, (*total.shape[:3], shift[0] - total.shape[3]), shift, shift]


_sums_p = define("forked_conv_sums", _plain_sums, multiple_results=True, shapes=_sums_shapes)
_gradient_p = define(
    "forked_conv_gradient",
    _plain_gradient,
    multiple_results=True,
    shapes=lambda x, mean, rstd, scale, *_: [(*x.shape[:3], *scale.shape), scale.shape, scale.shape],
)
_kernel_gradient_p = define(
    "forked_conv_kernel_gradient",
    _plain_kernel_gradient,
    shapes=lambda x, mean, rstd, scale, bias, *g: [(1, 1, *scale.shape, sum(one.shape[3] for one in g))],
)
