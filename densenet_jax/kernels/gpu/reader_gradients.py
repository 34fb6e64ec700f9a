"""The derivative of reading a normalised feature map, on a GPU and in one pass over it.

XLA reads x^ for the mask, for the gradients of scale and bias and for the kernel's gradient, and stores the rectified
values and their gradient in between. Here one read of x^ does all of it, and the gradient of x^ goes straight into the
buffer where the gradients of all readers add up.
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

from densenet_jax.kernels.gpu.tiles import (
    LARGEST_OPERAND,
    SMALLEST_SIDE,
    RowRanges,
    Tile,
    indices,
    load_matrix,
    load_vector,
    power_of_two,
    product,
    rectify,
    split_rows,
    store_matrix,
    wide,
)
from densenet_jax.kernels.primitive import define

MOST_OUTPUTS = 512  # a program holds the kernel's gradient for SMALLEST_SIDE channels and all outputs
_ACCUMULATOR = 128 * 128  # elements of that gradient which a program's registers hold
_PROGRAMS = 4 * 132  # four for each multiprocessor of an H200

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
    """The kernel of `add_gradients` itself; interpret runs it anywhere, slowly."""
    rows, (channels, outputs) = x.shape[0], kernel.shape
    if 0 in (rows, channels, outputs):
        return plain_add_gradients(total, x, scale, bias, kernel, gradient, groups=groups)
    tile = tile or _tile(outputs)
    blocks = pl.cdiv(channels, tile.channels)
    ranges = split_rows(rows, groups, tile.rows, most_ranges or _most_ranges(rows, outputs, blocks))
    count, kind = groups * ranges.ranges, wide(x.dtype)
    vector = jax.ShapeDtypeStruct((count, channels), kind)
    total, of_scale, of_bias, of_kernel = pl.pallas_call(
        functools.partial(_kernel, tile, ranges, channels, outputs),
        (
            jax.ShapeDtypeStruct(total.shape, total.dtype),
            vector,
            vector,
            jax.ShapeDtypeStruct((count, channels, outputs), kind),
        ),
        # Programs of the same rows beside each other: each reads their gradient, the first of them from memory.
        grid=(blocks, count),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="norm_relu_matmul_gradients",
    )(total, x, scale, bias, kernel.astype(x.dtype), gradient)
    of_scale, of_bias = (part.reshape(groups, ranges.ranges, channels).sum(axis=1) for part in (of_scale, of_bias))
    return total, of_scale, of_bias, of_kernel.sum(axis=0)


def _tile(outputs: int) -> Tile:
    whole = power_of_two(outputs)
    return Tile(rows=64, channels=max(SMALLEST_SIDE, min(128, _ACCUMULATOR // whole)), outputs=whole)


def _most_ranges(rows: int, outputs: int, blocks: int) -> int:
    """As many as fill the chip, but so few that their kernel gradients stay small beside x itself.

    A range writes 4 bytes for each channel and output, x has 2 for each row and channel: with rows / (8 * outputs)
    ranges, written and read again, those are half as much.
    """
    return max(1, min(pl.cdiv(_PROGRAMS, blocks), rows // (8 * outputs)))


def _kernel(
    tile: Tile,
    ranges: RowRanges,
    channels: int,
    outputs: int,
    total_ref: Any,
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    kernel_ref: Any,
    gradient_ref: Any,
    new_total_ref: Any,
    of_scale_ref: Any,
    of_bias_ref: Any,
    of_kernel_ref: Any,
) -> None:
    number, kind = pl.program_id(1), wide(x_ref.dtype)
    columns = indices(pl.program_id(0) * tile.channels, tile.channels, channels)
    every = indices(0, tile.outputs, outputs)
    scale, bias = load_vector(scale_ref, columns), load_vector(bias_ref, columns)
    kernel = load_matrix(kernel_ref, columns, every)
    start, end = ranges.bounds(number)

    def add(step: Any, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = indices(start + step * tile.rows, tile.rows, end)
        x, gradient = load_matrix(x_ref, rows, columns), load_matrix(gradient_ref, rows, every)
        activation = rectify(x, scale, bias)
        rectified = product(gradient, kernel, (1, 1))
        rectified = jnp.where(activation > 0, rectified, jnp.zeros_like(rectified))
        before = load_matrix(total_ref, rows, columns).astype(kind)
        store_matrix(new_total_ref, rows, columns, before + rectified * scale.astype(kind)[None, :])
        of_scale, of_bias, of_kernel = sums
        return (
            of_scale + jnp.sum(rectified * x.astype(kind), axis=0),
            of_bias + jnp.sum(rectified, axis=0),
            of_kernel + product(activation, gradient, (0, 0)),
        )

    zeros = jnp.zeros((tile.channels,), kind)
    sums = (zeros, zeros, jnp.zeros((tile.channels, tile.outputs), kind))
    of_scale, of_bias, of_kernel = lax.fori_loop(0, ranges.range_rows // tile.rows, add, sums)
    plgpu.store(of_scale_ref.at[number, columns[0]], of_scale, mask=columns[1])
    plgpu.store(of_bias_ref.at[number, columns[0]], of_bias, mask=columns[1])
    mask = columns[1][:, None] & every[1][None, :]
    plgpu.store(of_kernel_ref.at[number, columns[0], every[0]], of_kernel, mask=mask)


def _lower(ctx: Any, *operands: Any, groups: int) -> Any:
    outputs = ctx.avals_in[4].shape[1]
    if outputs > MOST_OUTPUTS or max(aval.size for aval in (*ctx.avals_in, *ctx.avals_out)) > LARGEST_OPERAND:
        return None
    return mlir.lower_fun(add_gradients_kernel, multiple_results=True)(ctx, *operands, groups=groups)


_primitive = define("add_gradients", plain_add_gradients, _lower, platform="cuda", multiple_results=True)
