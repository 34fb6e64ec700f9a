"""Backward kernels of dense layers' 1x1 convolutions on a GPU that were not measured yet: one instead of two.

The package computes the gradient of x_hat and the products for the gradients of kernel, scale and bias in two kernels,
which both read x_hat and the gradient of y. Here one kernel reads them once. It sums in one of two ways:

    sums: act^T @ gradient for the kernel, and sums over rows of the ReLU's gradient, and of it times x_hat, which stay
        in registers until the end;
    products: the two products of `norm_relu_matmul_gradients`, from which all follows.

Both can take the gradient of y apart: "norm" computes it in the kernel from the gradient of the activation behind the
bottleneck's norm and ReLU and from the bottleneck, so that it is never stored. `kernels.py --candidates` compares them
with the reference and times them beside the package's kernels. What is faster and right belongs into the package.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from densenet_jax.kernels.gpu import tiles

MULTIPROCESSORS = 132  # of an H100 or H200
FORMS = ("sums", "products")
# Rows, channels, warps and stages of a tile, and programs for each multiprocessor.
CHOICES = (
    (128, 64, 8, 3, 2), (128, 64, 8, 2, 2), (64, 64, 8, 3, 2), (64, 64, 8, 3, 4), (64, 64, 4, 3, 2), (64, 64, 4, 3, 4),
    (128, 32, 4, 3, 4), (128, 32, 8, 3, 4), (64, 32, 4, 3, 4), (64, 128, 8, 2, 2), (32, 128, 8, 3, 2),
    (256, 32, 8, 2, 2),
)  # fmt: skip
NORM_CHOICES = (
    (64, 64, 8, 2, 2), (64, 64, 8, 3, 2), (32, 64, 4, 3, 4), (32, 64, 8, 3, 4), (64, 64, 4, 2, 4), (64, 128, 8, 2, 2),
)  # fmt: skip
# Rows, channels, outputs, warps and stages of the forward kernel's tile.
FORWARD_CHOICES = (
    (128, 32, 128, 4, 3), (128, 32, 128, 4, 4), (128, 64, 128, 4, 2), (128, 64, 128, 4, 3), (128, 64, 128, 8, 3),
    (128, 32, 128, 8, 3), (64, 64, 128, 4, 3), (64, 32, 128, 4, 4), (256, 32, 128, 8, 3), (256, 64, 128, 8, 3),
    (128, 128, 128, 8, 2), (64, 128, 128, 4, 2),
)  # fmt: skip


def draw_norm(outputs: int) -> jax.Array:
    """Draws the second norm's float32[7, o]: mean, 1 / deviation, scale, bias, and the factors of its gradient."""
    return jnp.abs(jax.random.normal(jax.random.key(1), (7, outputs), jnp.float32))


def grad_before_norm(gradient: Any, bottleneck: Any, norm: Any) -> Any:
    """Returns the gradient of the bottleneck, [r, o], from that of relu(scale * x_hat + bias); norm is `draw_norm`'s.

    It is factors[0] * masked + factors[1] * x_hat + factors[2], as `Normalization.gradient_factors` has it.
    """
    mean, rstd, scale, bias, of_masked, of_x_hat, constant = (row[None, :] for row in norm)
    x_hat = ((bottleneck.astype(jnp.float32) - mean) * rstd).astype(bottleneck.dtype).astype(jnp.float32)
    masked = jnp.where(x_hat * scale + bias > 0, gradient.astype(jnp.float32), 0.0)
    return (of_masked * masked + of_x_hat * x_hat + constant).astype(gradient.dtype)


def add_gradients(
    total: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    kernel: jax.Array,
    gradient: jax.Array,
    *second: jax.Array,
    form: str,
    choice: tuple[int, int, int, int, int],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes `norm_relu_matmul_gradients.add_gradients` of one group in one kernel.

    Args:
        second: none, or the bottleneck and `draw_norm`'s array; gradient is then that of the activation behind both.
        form: of FORMS.
        choice: of CHOICES.
    """
    tile_rows, tile_channels, warps, stages, programs = choice
    rows, (channels, outputs) = x.shape[0], kernel.shape
    blocks = pl.cdiv(channels, tile_channels)
    ranges = tiles.split_rows(rows, 1, tile_rows, max(1, programs * MULTIPROCESSORS // blocks))
    tile = tiles.Tile(tile_rows, tile_channels, outputs, warps, stages)
    shapes = [jax.ShapeDtypeStruct(total.shape, total.dtype)]
    sides = {"sums": ((outputs, channels), (2, channels)), "products": ((2, outputs, channels),)}
    shapes += [jax.ShapeDtypeStruct((ranges.ranges, *side), jnp.float32) for side in sides[form]]
    total, *parts = pl.pallas_call(
        functools.partial(_kernel, form, tile, ranges, channels, len(second) > 0),
        tuple(shapes),
        grid=(blocks, ranges.ranges),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=f"norm_relu_matmul_gradients_{form}",
    )(total, x, scale, bias, kernel.astype(x.dtype), gradient, *second)
    first, *others = (part.sum(axis=0) for part in parts)
    if form == "sums":
        return total, others[0][:1], others[0][1:], first.T
    masked, read = first
    grad_bias, grad_scale = (jnp.sum(kernel.T * product, axis=0)[None] for product in (masked, read))
    return total, grad_scale, grad_bias, (scale[None] * read + bias[None] * masked).T


def _kernel(form: str, tile: tiles.Tile, ranges: tiles.RowRanges, channels: int, has_norm: bool, *refs: Any) -> None:
    total_ref, x_ref, scale_ref, bias_ref, kernel_ref, gradient_ref, *refs = refs  # type: ignore[assignment]
    bottleneck_ref, norm_ref = refs[:2] if has_norm else (None, None)
    new_total_ref, *result_refs = refs[2 if has_norm else 0 :]
    number = pl.program_id(1)
    start, end = ranges.bounds(number)
    columns = tiles.indices(pl.program_id(0) * tile.channels, tile.channels, channels)
    every = tiles.indices(0, tile.outputs, tile.outputs)
    scale, bias = tiles.load_vector(scale_ref, columns), tiles.load_vector(bias_ref, columns)
    kernel = tiles.load_matrix(kernel_ref, columns, every)
    norm = [plgpu.load(norm_ref.at[jnp.int32(row), every[0]]) for row in range(7)] if has_norm else []

    def add(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows = tiles.indices(start + step * tile.rows, tile.rows, end)
        x, gradient = tiles.load_matrix(x_ref, rows, columns), tiles.load_matrix(gradient_ref, rows, every)
        if has_norm:
            gradient = grad_before_norm(gradient, tiles.load_matrix(bottleneck_ref, rows, every), norm)
            gradient = jnp.where(rows[1][:, None], gradient, jnp.zeros_like(gradient))
        before = tiles.load_matrix(total_ref, rows, columns)
        activation = tiles.norm_relu(x, scale, bias)
        relu_mask = activation > 0
        grad_activation = tiles.product(gradient, kernel, (1, 1))
        grad_activation = jnp.where(relu_mask, grad_activation, jnp.zeros_like(grad_activation))
        added = before.astype(jnp.float32) + grad_activation * scale[None, :]
        tiles.store_matrix(new_total_ref, rows, columns, added)
        if form == "sums":
            of_kernel, of_scale, of_bias = sums
            of_kernel = of_kernel + tiles.product(gradient, activation, (0, 0))
            return of_kernel, of_scale + grad_activation * x.astype(jnp.float32), of_bias + grad_activation
        masked, read = sums
        masked = masked + tiles.product(gradient, relu_mask.astype(x.dtype), (0, 0))
        return masked, read + tiles.product(gradient, jnp.where(relu_mask, x, jnp.zeros_like(x)), (0, 0))

    product = jnp.zeros((tile.outputs, tile.channels), jnp.float32)
    by_row = jnp.zeros((tile.rows, tile.channels), jnp.float32)
    sums = lax.fori_loop(
        0, ranges.range_rows // tile.rows, add, (product, by_row, by_row) if form == "sums" else (product, product)
    )
    mask = every[1][:, None] & columns[1][None, :]
    if form == "sums":
        plgpu.store(result_refs[0].at[number, every[0], columns[0]], sums[0], mask=mask)
        for index, values in enumerate(sums[1:]):
            plgpu.store(
                result_refs[1].at[number, jnp.int32(index), columns[0]], jnp.sum(values, axis=0), mask=columns[1]
            )
    else:
        for index, values in enumerate(sums):
            plgpu.store(result_refs[0].at[number, jnp.int32(index), every[0], columns[0]], values, mask=mask)
