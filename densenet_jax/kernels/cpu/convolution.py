"""Convolution on a CPU: a bilinear primitive whose outputs and gradients the compiled library computes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.interpreters import ad
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu.library import target_names
from densenet_jax.kernels.cpu.primitive import are_known, available, define


def plain_convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """2-D convolution padded by the same number of zeros on every side, as XLA has it."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding), (padding, padding)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def usable(x: Array, kernel: Array, groups: int) -> bool:
    """Whether `convolve` takes these operands and has something to gain in this process."""
    return groups == 1 and available() and are_known(x, kernel)


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c o"], *, stride: int, padding: int
) -> Float[Array, "b h2 w2 o"]:
    """`plain_convolve` of operands that are `usable`."""
    return _output_p.bind(x, kernel, stride=stride, padding=padding)


def plain_input_gradient(
    g: Array, kernel: Array, *, sizes: tuple[int, int], stride: int, padding: int
) -> Float[Array, "b h w c"]:
    """The gradient of x, of height and width `sizes`, given g, that of `plain_convolve`'s output."""
    shape = jax.ShapeDtypeStruct((g.shape[0], *sizes, kernel.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: plain_convolve(x, kernel, stride=stride, padding=padding), shape)(g)[0]


def plain_kernel_gradient(
    x: Array, g: Array, *, sizes: tuple[int, int], stride: int, padding: int
) -> Float[Array, "kh kw c o"]:
    """The gradient of a kernel of height and width `sizes`, given g, that of `plain_convolve`'s output."""
    shape = jax.ShapeDtypeStruct((*sizes, x.shape[3], g.shape[3]), g.dtype)
    return jax.linear_transpose(lambda kernel: plain_convolve(x, kernel, stride=stride, padding=padding), shape)(g)[0]


def _lower_output(ctx: Any, x: Any, kernel: Any, *, stride: int, padding: int) -> Any:
    rule = jax.ffi.ffi_lowering(target_names()["output"])
    return rule(ctx, x, kernel, stride=np.int64(stride), padding=np.int64(padding), transposed=False)


def _lower_input_gradient(ctx: Any, g: Any, kernel: Any, *, sizes: tuple[int, int], stride: int, padding: int) -> Any:
    height, width = ctx.avals_in[1].shape[:2]
    if stride != 1 or height != width or padding >= height:
        return None
    rule = jax.ffi.ffi_lowering(target_names()["output"])
    return rule(ctx, g, kernel, stride=np.int64(1), padding=np.int64(height - 1 - padding), transposed=True)


def _lower_kernel_gradient(ctx: Any, x: Any, g: Any, *, sizes: tuple[int, int], stride: int, padding: int) -> Any:
    rule = jax.ffi.ffi_lowering(target_names()["kernel_gradient"])
    return rule(ctx, x, g, stride=np.int64(stride), padding=np.int64(padding))


_output_p = define("convolution", plain_convolve, _lower_output)
_input_gradient_p = define("convolution_input_gradient", plain_input_gradient, _lower_input_gradient)
_kernel_gradient_p = define("convolution_kernel_gradient", plain_kernel_gradient, _lower_kernel_gradient)


def _shape(operand: Any) -> tuple[int, ...]:
    return getattr(operand, "aval", operand).shape


# Each is the transpose of the others: <output(x, k), g> = <x, input_gradient(g, k)> = <k, kernel_gradient(x, g)>.
def _output_to_input(g: Array, x: Any, kernel: Array, **params: int) -> Array:
    return _input_gradient_p.bind(g, kernel, sizes=_shape(x)[1:3], **params)


def _output_to_kernel(g: Array, x: Array, kernel: Any, **params: int) -> Array:
    return _kernel_gradient_p.bind(x, g, sizes=_shape(kernel)[:2], **params)


def _input_gradient_to_gradient(x: Array, g: Any, kernel: Array, *, sizes: Any, **params: int) -> Array:
    return _output_p.bind(x, kernel, **params)


def _input_gradient_to_kernel(x: Array, g: Array, kernel: Any, *, sizes: Any, **params: int) -> Array:
    return _kernel_gradient_p.bind(x, g, sizes=_shape(kernel)[:2], **params)


def _kernel_gradient_to_input(kernel: Array, x: Any, g: Array, *, sizes: Any, **params: int) -> Array:
    return _input_gradient_p.bind(g, kernel, sizes=_shape(x)[1:3], **params)


def _kernel_gradient_to_gradient(kernel: Array, x: Array, g: Any, *, sizes: Any, **params: int) -> Array:
    return _output_p.bind(x, kernel, **params)


ad.defbilinear(_output_p, _output_to_input, _output_to_kernel)
ad.defbilinear(_input_gradient_p, _input_gradient_to_gradient, _input_gradient_to_kernel)
ad.defbilinear(_kernel_gradient_p, _kernel_gradient_to_input, _kernel_gradient_to_gradient)
