"""Reading a map on a CPU: relu(scale * x + bias), convolved, and its gradients, in one pass over x each.

The compiled library rectifies the few rows it has at hand on their way into the convolution, and masks, scales and sums
a gradient's rows while they are in cache: nothing but results goes through memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu.convolution import plain_convolve, plain_input_gradient, plain_kernel_gradient
from densenet_jax.kernels.cpu.library import target_names
from densenet_jax.kernels.cpu.primitive import are_known, available, define


def usable(x: Array, scale: Array, bias: Array, kernel: Array) -> bool:
    """Whether `read` and `gradients` take these operands and have something to gain in this process."""
    square = kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    return square and available() and are_known(x, scale, bias, kernel)


def read(
    x: Float[Array, "b h w c2"], scale: Float[Array, " c"], bias: Float[Array, " c"], kernel: Float[Array, "k k c o"]
) -> Float[Array, "b h w o"]:
    """relu(scale * x + bias) of the first c channels of x, convolved by a kernel of odd size, the map's size kept."""
    return _read_p.bind(x, scale, bias, kernel)


def gradients(
    x: Float[Array, "b h w c2"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "k k c o"],
    g: Float[Array, "b h w o"],
) -> tuple[Float[Array, "b h w c"], Float[Array, " c"], Float[Array, " c"], Float[Array, "k k c o"]]:
    """The gradients of the first c channels of x, of scale, bias and kernel, given g, that of `read`'s output."""
    of_x, of_scale, of_bias = _gradient_p.bind(x, scale, bias, kernel, g)
    return of_x, of_scale, of_bias, _kernel_gradient_p.bind(x, scale, bias, g, size=kernel.shape[0])


def add_gradients(
    total: Float[Array, "b h w c2"],
    x: Float[Array, "b h w c2"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "k k c o"],
    g: Float[Array, "b h w o"],
) -> tuple[Float[Array, "b h w c2"], Float[Array, " c"], Float[Array, " c"], Float[Array, "k k c o"]]:
    """`gradients`, of which that of x is added to the first c channels of total, in place if nothing else reads it."""
    total, of_scale, of_bias = _add_gradient_p.bind(total, x, scale, bias, kernel, g)
    return total, of_scale, of_bias, _kernel_gradient_p.bind(x, scale, bias, g, size=kernel.shape[0])


def _affine(x: Array, scale: Array, bias: Array) -> Array:
    return x[..., : scale.shape[0]] * scale[None, None, None, :] + bias[None, None, None, :]


def plain_read(x: Array, scale: Array, bias: Array, kernel: Array) -> Array:
    """The twin of `read`."""
    return plain_convolve(jax.nn.relu(_affine(x, scale, bias)), kernel, padding=kernel.shape[0] // 2)


def _plain_gradient(x: Array, scale: Array, bias: Array, kernel: Array, g: Array) -> tuple[Array, Array, Array]:
    sizes = (x.shape[1], x.shape[2])
    of_rectified = plain_input_gradient(g, kernel, sizes=sizes, stride=1, padding=kernel.shape[0] // 2)
    of_affine = jnp.where(_affine(x, scale, bias) > 0, of_rectified, 0)
    of_scale = jnp.sum(of_affine * x[..., : scale.shape[0]], axis=(0, 1, 2))
    return of_affine * scale[None, None, None, :], of_scale, jnp.sum(of_affine, axis=(0, 1, 2))


def _plain_add_gradient(total: Array, x: Array, *others: Array) -> tuple[Array, Array, Array]:
    of_x, of_scale, of_bias = _plain_gradient(x, *others)
    added = total[..., : of_x.shape[-1]] + of_x
    return lax.dynamic_update_slice_in_dim(total, added, 0, axis=3), of_scale, of_bias


def _plain_kernel_gradient(x: Array, scale: Array, bias: Array, g: Array, *, size: int) -> Array:
    rectified = jax.nn.relu(_affine(x, scale, bias))
    return plain_kernel_gradient(rectified, g, sizes=(size, size), stride=1, padding=size // 2)


def _lower(call: str, kernel: int = 3, **options: Any) -> Any:
    """A rule that calls the library; the kernel is the operand of that number, where no size is given."""

    def lowering(ctx: Any, *operands: Any, size: int = 0) -> Any:
        size = size or ctx.avals_in[kernel].shape[0]
        return jax.ffi.ffi_lowering(target_names()[call], **options)(ctx, *operands, padding=np.int64(size // 2))

    return lowering


_read_p = define("read", plain_read, _lower("read"))
_gradient_p = define("read_gradient", _plain_gradient, _lower("read_gradient"), multiple_results=True)
_add_gradient_p = define(
    "add_read_gradient",
    _plain_add_gradient,
    _lower("add_read_gradient", kernel=4, operand_output_aliases={0: 0}),
    multiple_results=True,
)
_kernel_gradient_p = define("read_kernel_gradient", _plain_kernel_gradient, _lower("read_kernel_gradient"))
