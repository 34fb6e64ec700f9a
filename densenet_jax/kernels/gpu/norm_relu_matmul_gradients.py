"""Gradients of norm_relu_conv with a 1x1 kernel on a GPU: two kernels that read x_hat from the block's buffer.

XLA stores the ReLU's output and its gradient. Here one kernel takes the gradient of y through the product and the ReLU
and adds it, in place, into the buffer where the gradients of all layers add up. The other one multiplies the gradient
of y with the ReLU's mask, and with x_hat under the mask:

    masked[o, c] = sum over rows of mask[r, c] * gradient[r, o]
    read[o, c] = sum over rows of mask[r, c] * x[r, c] * gradient[r, o]

From these two the gradients of kernel, scale and bias follow without reading the rows again: scale * read + bias *
masked, and the sums over outputs of kernel * read and of kernel * masked. So sums over rows are products only.
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

_PROGRAMS = 4 * 132  # four for each multiprocessor of an H100 or H200
# Up to this many rows: (rows, channels, warps, stages) of tiles with 128 outputs, the fastest of seven and eleven on an
# H200 (docs/performance.md).
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


@PallasOperation
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
    """Computes the gradients of `norm_relu_matmul`'s y, and adds that of x to total, the gradient so far.

    Args:
        x: read in its first c columns.
        kernel: of the 1x1 convolution; o is at most tiles.MOST_OUTPUTS for the kernel.
        gradient: of y, in x's dtype.
        groups: equal numbers of consecutive rows that scale's and bias's gradients are wanted for.

    Returns:
        The new total, with the columns from c on unchanged; the gradients of scale and bias for each group and of the
        kernel, in float32 or wider.
    """
    channels, kind = scale.shape[0], wide(x.dtype)
    front = x[:, :channels]
    activation = tiles.norm_relu(front, scale, bias)
    grad_activation = tiles.product(gradient, kernel.astype(x.dtype), (1, 1))
    grad_activation = jnp.where(activation > 0, grad_activation, jnp.zeros_like(grad_activation))
    added = (total[:, :channels].astype(kind) + grad_activation * scale.astype(kind)[None, :]).astype(total.dtype)
    by_group = grad_activation.reshape(groups, -1, channels)
    return (
        lax.dynamic_update_slice_in_dim(total, added, 0, axis=1),
        jnp.sum(by_group * front.astype(kind).reshape(by_group.shape), axis=1),
        jnp.sum(by_group, axis=1),
        tiles.product(activation, gradient, (0, 0)),
    )


def _supports(total: Any, x: Any, *others: Any, groups: int = 1) -> bool:
    return tiles.fits(x.shape, others[2].shape[1])


@add_gradients.define_kernel("cuda", _supports)
def _call_kernels(
    *operands: Array,
    groups: int = 1,
    tile: tiles.Tile | None = None,
    most_ranges: int | None = None,
    interpret: bool = False,
) -> Gradients:
    total, x, scale, bias, kernel, gradient = operands
    rows, (channels, outputs) = x.shape[0], kernel.shape
    kernel = kernel.astype(x.dtype)
    operands = (x, scale, bias, gradient)
    products_tile, inputs_tile = (tile or tiles.pick_tile(t, rows, outputs) for t in (_PRODUCTS_TILES, _INPUTS_TILES))
    products = _masked_products(products_tile, operands, (channels, outputs), groups, most_ranges, interpret)
    total = _add_inputs_gradient(inputs_tile, total, operands, kernel, interpret)
    grad_bias, grad_scale = jnp.sum(products * kernel.T.astype(products.dtype)[None, None], axis=2).swapaxes(0, 1)
    masked, read = products.sum(axis=0)
    grad_kernel = read * scale.astype(read.dtype)[None, :] + masked * bias.astype(read.dtype)[None, :]
    return total, grad_scale, grad_bias, grad_kernel.T


def _add_inputs_gradient(
    tile: tiles.Tile, total: Array, operands: tuple[Array, ...], kernel: Array, interpret: bool
) -> Float[Array, "r w"]:
    rows, (channels, outputs) = total.shape[0], kernel.shape
    return pl.pallas_call(
        functools.partial(_inputs_kernel, tile, rows, channels, outputs),
        jax.ShapeDtypeStruct(total.shape, total.dtype),
        # Programs for the same rows run next to each other: each reads their gradient, only the first from memory.
        grid=(pl.cdiv(channels, tile.channels), pl.cdiv(rows, tile.rows)),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="norm_relu_matmul_inputs_gradient",
    )(total, *operands, kernel)


def _inputs_kernel(tile: tiles.Tile, rows: int, channels: int, outputs: int, *refs: Any) -> None:
    total_ref, x_ref, scale_ref, bias_ref, gradient_ref, kernel_ref, new_total_ref = refs
    kind = wide(x_ref.dtype)
    own_rows = tiles.indices(pl.program_id(1) * tile.rows, tile.rows, rows)
    columns = tiles.indices(pl.program_id(0) * tile.channels, tile.channels, channels)
    every = tiles.indices(0, tile.outputs, outputs)
    x, before = tiles.load_matrix(x_ref, own_rows, columns), tiles.load_matrix(total_ref, own_rows, columns)
    gradient, kernel = tiles.load_matrix(gradient_ref, own_rows, every), tiles.load_matrix(kernel_ref, columns, every)
    scale, bias = tiles.load_vector(scale_ref, columns), tiles.load_vector(bias_ref, columns)
    grad_activation = tiles.product(gradient, kernel, (1, 1))
    grad_activation = jnp.where(tiles.norm_relu(x, scale, bias) > 0, grad_activation, jnp.zeros_like(grad_activation))
    added = before.astype(kind) + grad_activation * scale.astype(kind)[None, :]
    tiles.store_matrix(new_total_ref, own_rows, columns, added)


def _masked_products(
    tile: tiles.Tile,
    operands: tuple[Array, ...],
    shape: tuple[int, int],
    groups: int,
    most_ranges: int | None,
    interpret: bool,
) -> Float[Array, "g 2 o c"]:
    """Computes `masked` and `read` of the module's docstring for each group of rows, in float32 or wider."""
    x, (channels, outputs) = operands[0], shape
    rows, blocks = x.shape[0], pl.cdiv(channels, tile.channels)
    # Enough ranges to fill the chip, but few enough that writing and reading their sums moves no more bytes than x.
    most_ranges = most_ranges or max(1, min(pl.cdiv(_PROGRAMS, blocks), rows // (8 * outputs)))
    ranges = tiles.split_rows(rows, groups, tile.rows, most_ranges)
    count = groups * ranges.ranges
    products = pl.pallas_call(
        functools.partial(_products_kernel, tile, ranges, channels, outputs),
        jax.ShapeDtypeStruct((count, 2, outputs, channels), wide(x.dtype)),
        grid=(blocks, count),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="norm_relu_matmul_masked_products",
    )(*operands)
    return products.reshape(groups, ranges.ranges, 2, outputs, channels).sum(axis=1)


def _products_kernel(tile: tiles.Tile, ranges: tiles.RowRanges, channels: int, outputs: int, *refs: Any) -> None:
    x_ref, scale_ref, bias_ref, gradient_ref, products_ref = refs
    number, kind = pl.program_id(1), wide(x_ref.dtype)
    columns = tiles.indices(pl.program_id(0) * tile.channels, tile.channels, channels)
    every = tiles.indices(0, tile.outputs, outputs)
    scale, bias = tiles.load_vector(scale_ref, columns), tiles.load_vector(bias_ref, columns)
    start, end = ranges.bounds(number)

    def add(step: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = tiles.indices(start + step * tile.rows, tile.rows, end)
        x, gradient = tiles.load_matrix(x_ref, rows, columns), tiles.load_matrix(gradient_ref, rows, every)
        relu_mask = tiles.norm_relu(x, scale, bias) > 0
        masked, read = totals
        return (
            masked + tiles.product(gradient, relu_mask.astype(x.dtype), (0, 0)),
            read + tiles.product(gradient, jnp.where(relu_mask, x, jnp.zeros_like(x)), (0, 0)),
        )

    zeros = jnp.zeros((tile.outputs, tile.channels), kind)
    mask = every[1][:, None] & columns[1][None, :]
    for index, values in enumerate(lax.fori_loop(0, ranges.range_rows // tile.rows, add, (zeros, zeros))):
        plgpu.store(products_ref.at[number, jnp.int32(index), every[0], columns[0]], values, mask=mask)
