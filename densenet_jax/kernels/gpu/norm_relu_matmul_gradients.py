"""The derivative of reading a normalized feature map, on a GPU: two kernels that read it where it lies.

XLA stores the rectified values and their gradient. Here one kernel takes the gradient of y through the product and the
rectifier and adds it, in place, into the buffer where the gradients of all readers add up. The other one multiplies
the gradient of y with where the rectifiers are open, and with x^ there:

    opened[o, c] = sum over rows of open[r, c] * gradient[r, o], and read[o, c] the same of open[r, c] * x[r, c]

From these two the gradients of kernel, scale and bias follow without another look at the rows: scale * read + bias *
opened, and the sums over outputs of kernel * read and of kernel * opened. So sums over rows are products only.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.interpreters import mlir
from jaxtyping import Array, Float

from densenet_jax.dtypes import wide
from densenet_jax.kernels.dispatch import define
from densenet_jax.kernels.gpu.tiles import (
    LARGEST_OPERAND,
    MOST_OUTPUTS,
    RowRanges,
    Tile,
    indices,
    load_matrix,
    load_vector,
    product,
    rectify,
    split_rows,
    store_matrix,
    tile_for,
)

_PROGRAMS = 4 * 132  # four for each multiprocessor of an H100 or H200
# (rows, channels, warps, stages) of tiles with 128 outputs, for up to so many rows: the fastest of seven and eleven on
# an H200 (docs/performance.md).
_INPUTS_TILES = (
    (25_000, (64, 128, 8, 3)),
    (100_000, (128, 64, 8, 3)),
    (400_000, (64, 64, 4, 3)),
    (None, (128, 64, 4, 3)),
)
_PRODUCTS_TILES = (
    (25_000, (128, 64, 8, 3)),
    (100_000, (64, 64, 8, 4)),
    (400_000, (64, 64, 4, 3)),
    (None, (64, 64, 8, 3)),
)

Gradients = tuple[Float[Array, "r w"], Float[Array, "g c"], Float[Array, "g c"], Float[Array, "c o"]]


def plain_add_gradients(
    total: Float[Array, "r w"],
    x: Float[Array, "r w"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "c o"],
    gradient: Float[Array, "r o"],
    *,
    groups: int,
) -> Gradients:
    """The twin of `add_gradients`."""
    channels, kind = scale.shape[0], wide(x.dtype)
    front = x[:, :channels]
    activation = rectify(front, scale, bias)
    rectified = product(gradient, kernel.astype(x.dtype), (1, 1))
    rectified = jnp.where(activation > 0, rectified, jnp.zeros_like(rectified))
    added = (total[:, :channels].astype(kind) + rectified * scale.astype(kind)[None, :]).astype(total.dtype)
    by_group = rectified.reshape(groups, -1, channels)
    return (
        lax.dynamic_update_slice_in_dim(total, added, 0, axis=1),
        jnp.sum(by_group * front.astype(kind).reshape(by_group.shape), axis=1),
        jnp.sum(by_group, axis=1),
        product(activation, gradient, (0, 0)),
    )


def add_gradients(
    total: Float[Array, "r w"],
    x: Float[Array, "r w"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "c o"],
    gradient: Float[Array, "r o"],
    *,
    groups: int = 1,
) -> Gradients:
    """The derivative of y in `norm_relu_matmul`, that of x added to what other readers of x have given.

    On one GPU a kernel, which writes into total where it lies; anywhere else its twin, `plain_add_gradients`.

    Args:
      total: the gradient of x so far.
      x: what was read, in its first c columns.
      scale: of each channel.
      bias: of each channel.
      kernel: of the 1x1 convolution; o is at most MOST_OUTPUTS for the kernel.
      gradient: of y, in x's dtype.
      groups: equal numbers of consecutive rows that scale's and bias's gradients are wanted for.

    Returns:
      The new total, of which the columns from c on are unchanged; the gradients of scale and bias for each group and
      of the kernel, in float32 or wider.
    """
    return tuple(_primitive.bind(total, x, scale, bias, kernel, gradient, groups=groups))


def add_gradients_kernel(
    total: Array,
    x: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    gradient: Array,
    *,
    groups: int,
    tile: Tile | None = None,
    most_ranges: int | None = None,
    interpret: bool = False,
) -> Gradients:
    """The kernels of `add_gradients` themselves; interpret runs them anywhere, slowly."""
    rows, (channels, outputs) = x.shape[0], kernel.shape
    if 0 in (rows, channels, outputs):
        return plain_add_gradients(total, x, scale, bias, kernel, gradient, groups=groups)
    kernel = kernel.astype(x.dtype)
    operands = (x, scale, bias, gradient)
    products = _open_products(
        tile or tile_for(_PRODUCTS_TILES, rows, outputs), operands, (channels, outputs), groups, most_ranges, interpret
    )
    total = _add_inputs_gradient(tile or tile_for(_INPUTS_TILES, rows, outputs), total, operands, kernel, interpret)
    of_bias, of_scale = jnp.sum(products * kernel.T.astype(products.dtype)[None, None], axis=2).swapaxes(0, 1)
    opened, read = products.sum(axis=0)
    of_kernel = read * scale.astype(read.dtype)[None, :] + opened * bias.astype(read.dtype)[None, :]
    return total, of_scale, of_bias, of_kernel.T


def _add_inputs_gradient(
    tile: Tile, total: Array, operands: tuple[Array, ...], kernel: Array, interpret: bool
) -> Float[Array, "r w"]:
    rows, (channels, outputs) = total.shape[0], kernel.shape
    return pl.pallas_call(
        functools.partial(_inputs_kernel, tile, rows, channels, outputs),
        jax.ShapeDtypeStruct(total.shape, total.dtype),
        # Programs of the same rows beside each other: each reads their gradient, the first of them from memory.
        grid=(pl.cdiv(channels, tile.channels), pl.cdiv(rows, tile.rows)),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="norm_relu_matmul_inputs_gradient",
    )(total, *operands, kernel)


def _inputs_kernel(
    tile: Tile,
    rows: int,
    channels: int,
    outputs: int,
    total_ref: Any,
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    gradient_ref: Any,
    kernel_ref: Any,
    new_total_ref: Any,
) -> None:
    kind = wide(x_ref.dtype)
    own_rows = indices(pl.program_id(1) * tile.rows, tile.rows, rows)
    columns = indices(pl.program_id(0) * tile.channels, tile.channels, channels)
    every = indices(0, tile.outputs, outputs)
    x, before = load_matrix(x_ref, own_rows, columns), load_matrix(total_ref, own_rows, columns)
    gradient, kernel = load_matrix(gradient_ref, own_rows, every), load_matrix(kernel_ref, columns, every)
    scale, bias = load_vector(scale_ref, columns), load_vector(bias_ref, columns)
    rectified = product(gradient, kernel, (1, 1))
    rectified = jnp.where(rectify(x, scale, bias) > 0, rectified, jnp.zeros_like(rectified))
    store_matrix(new_total_ref, own_rows, columns, before.astype(kind) + rectified * scale.astype(kind)[None, :])


def _open_products(
    tile: Tile,
    operands: tuple[Array, ...],
    shape: tuple[int, int],
    groups: int,
    most_ranges: int | None,
    interpret: bool,
) -> Float[Array, "g 2 o c"]:
    """`opened` and `read` of the module's docstring for each group of rows, in float32 or wider."""
    x, (channels, outputs) = operands[0], shape
    blocks = pl.cdiv(channels, tile.channels)
    ranges = split_rows(x.shape[0], groups, tile.rows, most_ranges or _most_ranges(x.shape[0], outputs, blocks))
    count = groups * ranges.ranges
    found = pl.pallas_call(
        functools.partial(_products_kernel, tile, ranges, channels, outputs),
        jax.ShapeDtypeStruct((count, 2, outputs, channels), wide(x.dtype)),
        grid=(blocks, count),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="norm_relu_matmul_open_products",
    )(*operands)
    return found.reshape(groups, ranges.ranges, 2, outputs, channels).sum(axis=1)


def _most_ranges(rows: int, outputs: int, blocks: int) -> int:
    """As many as fill the chip, but so few that what they write stays as small as x itself.

    A range writes 8 bytes for each channel and output, x has 2 for each row and channel: with rows / (8 * outputs)
    ranges, written and read again, those are as much.
    """
    return max(1, min(pl.cdiv(_PROGRAMS, blocks), rows // (8 * outputs)))


def _products_kernel(
    tile: Tile,
    ranges: RowRanges,
    channels: int,
    outputs: int,
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    gradient_ref: Any,
    products_ref: Any,
) -> None:
    number, kind = pl.program_id(1), wide(x_ref.dtype)
    columns = indices(pl.program_id(0) * tile.channels, tile.channels, channels)
    every = indices(0, tile.outputs, outputs)
    scale, bias = load_vector(scale_ref, columns), load_vector(bias_ref, columns)
    start, end = ranges.bounds(number)

    def add(step: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = indices(start + step * tile.rows, tile.rows, end)
        x, gradient = load_matrix(x_ref, rows, columns), load_matrix(gradient_ref, rows, every)
        is_open = rectify(x, scale, bias) > 0
        opened, read = totals
        return (
            opened + product(gradient, is_open.astype(x.dtype), (0, 0)),
            read + product(gradient, jnp.where(is_open, x, jnp.zeros_like(x)), (0, 0)),
        )

    zeros = jnp.zeros((tile.outputs, tile.channels), kind)
    mask = every[1][:, None] & columns[1][None, :]
    for index, values in enumerate(lax.fori_loop(0, ranges.range_rows // tile.rows, add, (zeros, zeros))):
        plgpu.store(products_ref.at[number, jnp.int32(index), every[0], columns[0]], values, mask=mask)


def _lower(ctx: Any, *operands: Any, groups: int) -> Any:
    outputs = ctx.avals_in[4].shape[1]
    if outputs > MOST_OUTPUTS or max(aval.size for aval in (*ctx.avals_in, *ctx.avals_out)) > LARGEST_OPERAND:
        return None
    return mlir.lower_fun(add_gradients_kernel, multiple_results=True)(ctx, *operands, groups=groups)


_primitive = define("add_gradients", plain_add_gradients, _lower, platform="cuda", multiple_results=True)
