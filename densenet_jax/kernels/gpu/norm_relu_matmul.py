"""norm_relu_conv with a 1x1 kernel on a GPU: relu(scale * x_hat + bias) @ kernel, and sums for its statistics.

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
from jaxtyping import Array, Float

from densenet_jax.dtypes import wide
from densenet_jax.kernels.dispatch import PallasOperation
from densenet_jax.kernels.gpu import tiles

# Up to this many rows: (rows, channels, warps, stages), the fastest of six on an H200 (docs/performance.md).
_TILES = ((400_000, (128, 64, 4, 3)), (None, (128, 32, 4, 3)))

Sums = tuple[Float[Array, "r o"], Float[Array, "g o"], Float[Array, "g o"]]


@PallasOperation
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

    Args:
        x: rows of positions, w >= c columns.
        shift: near y's means, so that its sums of squares do not cancel.
        groups: equal numbers of consecutive rows that are summed separately.

    Returns:
        y in x's dtype; the sums of y - shift and of its square over each group, in float32 or wider, of y as rounded.
    """
    activation = tiles.norm_relu(x[:, : scale.shape[0]], scale, bias)
    y = tiles.product(activation, kernel.astype(x.dtype), (1, 0)).astype(x.dtype)
    centered = (y.astype(wide(x.dtype)) - shift.astype(wide(x.dtype))[None, :]).reshape(groups, -1, y.shape[1])
    return y, jnp.sum(centered, axis=1), jnp.sum(jnp.square(centered), axis=1)


def _supports(x: Any, *others: Any, groups: int = 1) -> bool:
    return tiles.fits(x.shape, others[2].shape[1])


@norm_relu_matmul.define_kernel("cuda", _supports)
def _call_kernel(*operands: Array, groups: int = 1, tile: tiles.Tile | None = None, interpret: bool = False) -> Sums:
    x, scale, bias, kernel, shift = operands
    rows, (channels, outputs) = x.shape[0], kernel.shape
    tile = tile or tiles.pick_tile(_TILES, rows, outputs, most_outputs=128)
    ranges = tiles.split_rows(rows, groups, tile.rows)
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


def _kernel(tile: tiles.Tile, ranges: tiles.RowRanges, channels: int, outputs: int, *refs: Any) -> None:
    x_ref, scale_ref, bias_ref, kernel_ref, shift_ref, y_ref, sums_ref = refs
    number = pl.program_id(1)
    columns = tiles.indices(pl.program_id(0) * tile.outputs, tile.outputs, outputs)
    start, end = ranges.bounds(number)
    rows = tiles.indices(start, tile.rows, end)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        read = tiles.indices(step * tile.channels, tile.channels, channels)
        activation = tiles.norm_relu(
            tiles.load_matrix(x_ref, rows, read), tiles.load_vector(scale_ref, read), tiles.load_vector(bias_ref, read)
        )
        return total + tiles.product(activation, tiles.load_matrix(kernel_ref, read, columns), (1, 0))

    accumulator = jnp.zeros((tile.rows, tile.outputs), wide(x_ref.dtype))
    y = lax.fori_loop(0, pl.cdiv(channels, tile.channels), add, accumulator).astype(y_ref.dtype)
    tiles.store_matrix(y_ref, rows, columns, y)
    centered = y.astype(sums_ref.dtype) - tiles.load_vector(shift_ref, columns).astype(sums_ref.dtype)[None, :]
    centered = jnp.where(rows[1][:, None], centered, jnp.zeros_like(centered))
    for index, values in enumerate((centered, centered * centered)):
        plgpu.store(sums_ref.at[number, jnp.int32(index), columns[0]], jnp.sum(values, axis=0), mask=columns[1])
