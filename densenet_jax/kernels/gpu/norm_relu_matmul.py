"""norm_relu_conv by a 1x1 kernel on a GPU: relu(scale * x_hat + bias) @ kernel, and sums for its statistics.

XLA stores the ReLU's output before the product and reads the product again for its statistics. Here the product's
prologue applies scale, bias and ReLU, and its epilogue sums the output for the next batch norm.
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
    RowRanges,
    Tile,
    indices,
    load_matrix,
    load_vector,
    norm_relu,
    product,
    split_rows,
    store_matrix,
    tile_for,
)

# Up to this many rows: (rows, channels, warps, stages), the fastest of six on an H200 (docs/performance.md).
_TILES = ((400_000, (128, 64, 4, 3)), (None, (128, 32, 4, 3)))

Sums = tuple[Float[Array, "r o"], Float[Array, "g o"], Float[Array, "g o"]]


def plain_norm_relu_matmul(
    x: Float[Array, "r w"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "c o"],
    shift: Float[Array, " o"],
    *,
    groups: int,
) -> Sums:
    """Computes `norm_relu_matmul` in plain JAX."""
    activation = norm_relu(x[:, : scale.shape[0]], scale, bias)
    y = product(activation, kernel.astype(x.dtype), (1, 0)).astype(x.dtype)
    centered = (y.astype(wide(x.dtype)) - shift.astype(wide(x.dtype))[None, :]).reshape(groups, -1, y.shape[1])
    return y, jnp.sum(centered, axis=1), jnp.sum(jnp.square(centered), axis=1)


def norm_relu_matmul(
    x: Float[Array, "r w"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "c o"],
    shift: Float[Array, " o"],
    *,
    groups: int = 1,
) -> Sums:
    """Returns y = relu(scale * x + bias) @ kernel for the first c columns of x, and sums of y over groups of rows.

    On one GPU a kernel, which reads x where it lies; anywhere else `plain_norm_relu_matmul`.

    Args:
        x: rows of positions, w >= c columns.
        shift: near y's means, so that its sums of squares do not cancel.
        groups: equal numbers of consecutive rows that are summed separately.

    Returns:
        y in x's dtype; the sums of y - shift and of its square over each group, in float32 or wider, of y as rounded.
    """
    return tuple(_primitive.bind(x, scale, bias, kernel, shift, groups=groups))


def norm_relu_matmul_kernel(
    x: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    shift: Array,
    *,
    groups: int,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Sums:
    """Calls the kernel of `norm_relu_matmul`; interpret runs it anywhere, slowly."""
    rows, (channels, outputs) = x.shape[0], kernel.shape
    if 0 in (rows, channels, outputs):
        return plain_norm_relu_matmul(x, scale, bias, kernel, shift, groups=groups)
    tile = tile or tile_for(_TILES, rows, outputs, most_outputs=128)
    ranges = split_rows(rows, groups, tile.rows)
    y, sums = pl.pallas_call(
        functools.partial(_kernel, tile, ranges, channels, outputs),
        (
            jax.ShapeDtypeStruct((rows, outputs), x.dtype),
            jax.ShapeDtypeStruct((groups * ranges.ranges, 2, outputs), wide(x.dtype)),
        ),
        # Programs for the same rows run next to each other, so that they share the rows in the cache.
        grid=(pl.cdiv(outputs, tile.outputs), groups * ranges.ranges),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="norm_relu_matmul",
    )(x, scale, bias, kernel.astype(x.dtype), shift)
    sums = sums.reshape(groups, ranges.ranges, 2, outputs).sum(axis=1)
    return y, sums[:, 0], sums[:, 1]


def _kernel(
    tile: Tile,
    ranges: RowRanges,
    channels: int,
    outputs: int,
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    kernel_ref: Any,
    shift_ref: Any,
    y_ref: Any,
    sums_ref: Any,
) -> None:
    number = pl.program_id(1)
    columns = indices(pl.program_id(0) * tile.outputs, tile.outputs, outputs)
    start, end = ranges.bounds(number)
    rows = indices(start, tile.rows, end)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        read = indices(step * tile.channels, tile.channels, channels)
        activation = norm_relu(
            load_matrix(x_ref, rows, read), load_vector(scale_ref, read), load_vector(bias_ref, read)
        )
        return total + product(activation, load_matrix(kernel_ref, read, columns), (1, 0))

    accumulator = jnp.zeros((tile.rows, tile.outputs), wide(x_ref.dtype))
    y = lax.fori_loop(0, pl.cdiv(channels, tile.channels), add, accumulator).astype(y_ref.dtype)
    store_matrix(y_ref, rows, columns, y)
    centered = y.astype(sums_ref.dtype) - load_vector(shift_ref, columns).astype(sums_ref.dtype)[None, :]
    centered = jnp.where(rows[1][:, None], centered, jnp.zeros_like(centered))
    for index, values in enumerate((centered, centered * centered)):
        plgpu.store(sums_ref.at[number, jnp.int32(index), columns[0]], jnp.sum(values, axis=0), mask=columns[1])


def _lower(ctx: Any, *operands: Any, groups: int) -> Any:
    if max(aval.size for aval in (*ctx.avals_in, *ctx.avals_out)) > LARGEST_OPERAND:
        return None
    return mlir.lower_fun(norm_relu_matmul_kernel, multiple_results=True)(ctx, *operands, groups=groups)


_primitive = define("norm_relu_matmul", plain_norm_relu_matmul, _lower, platform="cuda", multiple_results=True)
