"""Convolution on a CPU: a bilinear primitive whose output and gradients the compiled kernels compute.

A group of a Dual Path Network has only 3 to 32 channels, so the kernels join groups until they fill a vector and
convolve them with a block-diagonal kernel. It multiplies by zeros, and is 2.5 to 40 times as fast as XLA's grouped
convolution (docs/performance.md). A depthwise convolution (RDNet) is a sum of shifted products, which XLA fuses
into one loop; only its kernel's gradient is computed by the kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, mlir
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu.primitive import are_known, call_kernel, define, is_available


def plain_convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Convolves in 2-D with XLA and the same zero padding on every side."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding), (padding, padding)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def is_usable(x: Array, kernel: Array) -> bool:
    """Whether the kernels are available and support these operands."""
    return is_available() and are_known(x, kernel)


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw i o"], *, stride: int, padding: int, groups: int = 1
) -> Float[Array, "b h2 w2 o"]:
    """Computes `plain_convolve` of operands for which `is_usable`."""
    return _output_p.bind(x, kernel, stride=stride, padding=padding, groups=groups)


def convolve_fast(x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw i o"], **options: int) -> Array:
    """Computes `plain_convolve` by the kernels where they are usable."""
    kernel = kernel.astype(x.dtype)
    return convolve(x, kernel, **options) if is_usable(x, kernel) else plain_convolve(x, kernel, **options)


def plain_input_gradient(
    g: Array, kernel: Array, *, sizes: tuple[int, int], stride: int, padding: int, groups: int = 1
) -> Float[Array, "b h w c"]:
    """Returns the gradient of x, of height and width `sizes`; g is that of `plain_convolve`'s output."""
    shape = jax.ShapeDtypeStruct((g.shape[0], *sizes, groups * kernel.shape[2]), g.dtype)
    forward = functools.partial(plain_convolve, kernel=kernel, stride=stride, padding=padding, groups=groups)
    return jax.linear_transpose(forward, shape)(g)[0]


def plain_kernel_gradient(
    x: Array, g: Array, *, sizes: tuple[int, int], stride: int, padding: int, groups: int = 1
) -> Float[Array, "kh kw i o"]:
    """Returns the gradient of a kernel of height and width `sizes`; g is that of `plain_convolve`'s output."""
    shape = jax.ShapeDtypeStruct((*sizes, x.shape[3] // groups, g.shape[3]), g.dtype)
    forward = functools.partial(plain_convolve, x, stride=stride, padding=padding, groups=groups)
    return jax.linear_transpose(forward, shape)(g)[0]


LANES = 16  # float32 numbers in the widest vector


def group_sizes(groups: int, features: int) -> dict[str, Any]:
    """Returns the kernels' attributes: groups of `features` outputs each, and how many one product takes together."""
    together = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * features <= LANES))
    return {"groups": groups, "together": together}


def dilate(
    g: Float[Array, "b h2 w2 o"], kernel: Array, *, sizes: tuple[int, int], stride: int, padding: int
) -> Float[Array, "b h3 w3 o"]:
    """Inserts zeros into an output's gradient to make it that of a convolution at stride 1; sizes are the input's."""
    filled = [stride * (size - 1) + 1 for size in g.shape[1:3]]
    behind = [sizes[i] + 2 * padding - kernel.shape[i] + 1 - filled[i] for i in range(2)]
    return lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *((0, more, stride - 1) for more in behind), (0, 0, 0)])


def _dilate_input_gradient(
    g: Array, kernel: Array, *, sizes: tuple[int, int], stride: int, padding: int, groups: int
) -> Float[Array, "b h w c"]:
    """Takes the dilated gradient at stride 1: more products than needed, but the kernels are faster still."""
    g = dilate(g, kernel, sizes=sizes, stride=stride, padding=padding)
    return _input_gradient_p.bind(g, kernel, sizes=sizes, stride=1, padding=padding, groups=groups)


def _shift_and_add(x: Array, kernel: Array, *, padding: int) -> Float[Array, "b h2 w2 c"]:
    """Convolves depthwise at stride 1: 8 to 11 times as fast as XLA's grouped convolution with a 7x7 kernel."""
    sides = [size + 2 * padding - kernel.shape[i] + 1 for i, size in enumerate(x.shape[1:3])]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    total = jnp.zeros((x.shape[0], *sides, x.shape[3]), x.dtype)
    for row, column in np.ndindex(*kernel.shape[:2]):
        part = x[:, row : row + sides[0], column : column + sides[1]]
        total = total + part * kernel[row, column][None, None]
    return total


def _turn_shift_and_add(g: Array, kernel: Array, *, padding: int) -> Float[Array, "b h w c"]:
    return _shift_and_add(g, kernel[::-1, ::-1], padding=padding)


def _lower_output(ctx: Any, x: Any, kernel: Any, *, groups: int, **sizes: Any) -> Any:
    features = ctx.avals_in[1].shape[3] // groups
    if features == 1 and ctx.avals_in[1].shape[2] == 1 and groups > 1 and sizes["stride"] == 1:
        lower = mlir.lower_fun(_shift_and_add, multiple_results=False)
        return lower(ctx, x, kernel, padding=sizes["padding"])
    return call_kernel("output", ctx, x, kernel, transposed=False, **sizes, **group_sizes(groups, features))


def _lower_input_gradient(
    ctx: Any, g: Any, kernel: Any, *, sizes: tuple[int, int], stride: int, padding: int, groups: int
) -> Any:
    height, width, features, _ = ctx.avals_in[1].shape
    if stride > 1 and groups > 1:
        lower = mlir.lower_fun(_dilate_input_gradient, multiple_results=False)
        return lower(ctx, g, kernel, sizes=sizes, stride=stride, padding=padding, groups=groups)
    if stride != 1 or height != width or padding >= height:
        return None
    if features == 1 and groups > 1 and ctx.avals_in[1].shape[3] == groups:
        lower = mlir.lower_fun(_turn_shift_and_add, multiple_results=False)
        return lower(ctx, g, kernel, padding=height - 1 - padding)
    attributes = {"stride": 1, "padding": height - 1 - padding, **group_sizes(groups, features)}
    return call_kernel("output", ctx, g, kernel, transposed=True, **attributes)


def _lower_kernel_gradient(ctx: Any, x: Any, g: Any, *, sizes: tuple[int, int], groups: int, **strided: Any) -> Any:
    features = ctx.avals_in[1].shape[3] // groups
    return call_kernel("kernel_gradient", ctx, x, g, **strided, **group_sizes(groups, features))


_output_p = define("convolution", plain_convolve, _lower_output)
_input_gradient_p = define("convolution_input_gradient", plain_input_gradient, _lower_input_gradient)
_kernel_gradient_p = define("convolution_kernel_gradient", plain_kernel_gradient, _lower_kernel_gradient)


def _shape(operand: Any) -> tuple[int, ...]:
    return getattr(operand, "aval", operand).shape


# Each is the transpose of the others: <output(x, k), g> = <x, input_gradient(g, k)> = <k, kernel_gradient(x, g)>.
ad.defbilinear(
    _output_p,
    lambda g, x, kernel, **params: _input_gradient_p.bind(g, kernel, sizes=_shape(x)[1:3], **params),
    lambda g, x, kernel, **params: _kernel_gradient_p.bind(x, g, sizes=_shape(kernel)[:2], **params),
)
ad.defbilinear(
    _input_gradient_p,
    lambda x, g, kernel, *, sizes, **params: _output_p.bind(x, kernel, **params),
    lambda x, g, kernel, *, sizes, **params: _kernel_gradient_p.bind(x, g, sizes=_shape(kernel)[:2], **params),
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda kernel, x, g, *, sizes, **params: _input_gradient_p.bind(g, kernel, sizes=_shape(x)[1:3], **params),
    lambda kernel, x, g, *, sizes, **params: _output_p.bind(x, kernel, **params),
)
