"""Gradients of norm_relu_conv with a dense layer's 3x3 kernel on a TPU: one kernel that reads the bottleneck once.

XLA first computes the gradient of the layer's output, then two convolutions that both read it and the bottleneck. This
kernel computes that gradient as it reads the block's buffers, and from the nine positions around each position takes
both products: with the convolution's kernel, and with the activation.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from densenet_jax.dtypes import wide
from densenet_jax.kernels.dispatch import PallasOperation
from densenet_jax.kernels.tpu import tiles

TAPS = 9
_SIDE = 3

Gradients = tuple[Float[Array, "b h w o"], Float[Array, "g o"], Float[Array, "g o"], Float[Array, "3 3 o k"]]


def _by_example(values: Float[Array, "g c"], examples: int) -> Float[Array, "b 1 1 c"]:
    return jnp.repeat(values, examples // values.shape[0], axis=0)[:, None, None, :]


def _by_group(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "g c"]:
    return x.reshape(groups, -1, x.shape[-1]).sum(axis=1)


@PallasOperation
def conv3x3_gradients(
    total: Float[Array, "b h w c2"],
    x: Float[Array, "b h w c2"],
    coefficients: Float[Array, "g 3 k"],
    bottleneck: Float[Array, "b h w o"],
    mean: Float[Array, "g o"],
    rstd: Float[Array, "g o"],
    scale: Float[Array, " o"],
    bias: Float[Array, " o"],
    kernel: Float[Array, "3 3 o k"],
    *,
    start: int,
) -> Gradients:
    """Computes the gradients of relu(scale * (bottleneck - mean) * rstd + bias), convolved by 3x3, back to the ReLU.

    Args:
        total: the gradient of a block's x_hat; columns start to start + k belong to the layer's output.
        coefficients: for each group of examples a, b, c with a * total + b * x + c the gradient of the convolution's
            output, in those columns.
        mean: of the bottleneck, for each group.
        rstd: 1 / deviation, likewise.

    Returns:
        The gradient before the ReLU, in x's dtype; the gradients of scale and bias for each group and of the kernel, in
        float32 or wider.
    """
    examples, kind, end = x.shape[0], wide(x.dtype), start + kernel.shape[-1]
    total_factor, x_factor, constant = (
        _by_example(values, examples) for values in coefficients.astype(kind).swapaxes(0, 1)
    )
    made, front = total[..., start:end].astype(kind), x[..., start:end].astype(kind)
    raw = (total_factor * made + x_factor * front + constant).astype(x.dtype)
    normalized = (bottleneck.astype(kind) - _by_example(mean.astype(kind), examples)) * _by_example(
        rstd.astype(kind), examples
    )
    normalized = normalized.astype(x.dtype)
    scales, biases = (values.astype(kind)[None, None, None, :] for values in (scale, bias))
    activation = jnp.maximum(scales * normalized.astype(kind) + biases, 0).astype(x.dtype)

    def convolve(activation: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            activation.astype(kind), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    _, pullback = jax.vjp(convolve, activation, kernel.astype(x.dtype).astype(kind))
    grad_activation, grad_kernel = pullback(raw.astype(kind))
    masked = jnp.where(activation > 0, grad_activation.astype(kind), jnp.zeros_like(grad_activation, kind))
    groups = mean.shape[0]
    grad_scale = _by_group(masked * normalized.astype(kind), groups)
    return masked.astype(x.dtype), grad_scale, _by_group(masked, groups), grad_kernel


def fits(x: jax.ShapeDtypeStruct | Array, kernel_shape: tuple[int, ...], start: int) -> bool:
    """Whether the kernel takes such operands: x as in `conv3x3_gradients`, or its shape and dtype."""
    examples, _, width, _ = x.shape
    *sides, outputs, new = kernel_shape
    aligned = start % new == 0 and new % tiles.SUBLANES == 0 and outputs % tiles.SUBLANES == 0
    return (
        tuple(sides) == (_SIDE, _SIDE)
        and examples > 0
        and examples % tiles.LANES == 0
        and aligned
        and _on_chip_bytes(1, width, outputs, new, x.dtype) <= tiles.ON_CHIP_BYTES
    )


def _on_chip_bytes(rows: int, width: int, outputs: int, new: int, dtype: Any) -> int:
    """Returns the bytes that this many rows need, double buffering included."""
    a_row = width * tiles.LANES * jnp.dtype(dtype).itemsize
    maps = 2 * a_row * (2 * rows * outputs + 2 * (rows + 2) * new)
    sums = 2 * jnp.dtype(wide(dtype)).itemsize * outputs * (TAPS * new + 2 * tiles.LANES)
    return maps + a_row * (rows + 2) * new * (width + 2) // width + sums


def _supports(total: Any, x: Any, coefficients: Any, *others: Any, start: int) -> bool:
    return coefficients.shape[0] == 1 and fits(x, others[-1].shape, start)


@conv3x3_gradients.define_kernel("tpu", _supports)
def _call_kernel(*operands: Array, start: int, most_rows: int | None = None, interpret: bool = False) -> Gradients:
    """Calls the kernel for one group of examples, with at most most_rows a program."""
    total, x, coefficients, bottleneck, mean, rstd, scale, bias, kernel = operands
    examples, height, width, _ = x.shape
    outputs, new = kernel.shape[2:]
    lanes, kind, dtype = min(tiles.LANES, examples), wide(x.dtype), x.dtype
    rows = tiles.part_of(height, most_rows, lambda rows: _on_chip_bytes(rows, width, outputs, new, dtype))
    taps = kernel.astype(dtype).transpose(2, 0, 1, 3).reshape(outputs, TAPS * new)
    columns = start // new

    def own(channels: int, place: int = 0) -> pl.BlockSpec:
        return pl.BlockSpec((rows, width, channels, lanes), lambda n, i: (i, 0, place, n))

    above = pl.BlockSpec((1, width, new, lanes), lambda n, i: (jnp.maximum(i * rows - 1, 0), 0, columns, n))
    below = pl.BlockSpec((1, width, new, lanes), lambda n, i: (jnp.minimum((i + 1) * rows, height - 1), 0, columns, n))
    made, read = tiles.examples_last(total), tiles.examples_last(x)
    positions = height * width * examples
    moved = (2 * outputs + 2 * new * (rows + 2) / rows) * positions * dtype.itemsize
    masked, grad_scale, grad_bias, grad_kernel = pl.pallas_call(
        functools.partial(_kernel, rows, width, height // rows),
        out_shape=(
            jax.ShapeDtypeStruct((height, width, outputs, examples), dtype),
            *[jax.ShapeDtypeStruct((outputs, lanes), kind)] * 2,
            jax.ShapeDtypeStruct((outputs, TAPS * new), kind),
        ),
        grid=(examples // lanes, height // rows),
        in_specs=[
            own(outputs),
            *[own(new, columns), above, below] * 2,
            *[tiles.whole(new, 1)] * 3,
            *[tiles.whole(outputs, 1)] * 4,
            tiles.whole(outputs, TAPS * new),
        ],
        out_specs=(own(outputs), *[tiles.whole(outputs, lanes)] * 2, tiles.whole(outputs, TAPS * new)),
        scratch_shapes=[pltpu.VMEM((rows + 2, width + 2, new, lanes), dtype)],
        compiler_params=tiles.PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=4 * positions * outputs * TAPS * new, transcendentals=0, bytes_accessed=round(moved)
        ),
        interpret=interpret,
        name="dense_layer_conv3x3_gradients",
    )(
        tiles.examples_last(bottleneck),
        *[made] * 3,
        *[read] * 3,
        *(tiles.column(values, kind) for values in coefficients[0]),
        *(tiles.column(values, kind) for values in (mean[0], rstd[0], scale, bias)),
        taps,
    )
    return (
        tiles.examples_first(masked),
        grad_scale.sum(axis=1)[None],
        grad_bias.sum(axis=1)[None],
        grad_kernel.reshape(outputs, _SIDE, _SIDE, new).transpose(1, 2, 0, 3),
    )


def _kernel(rows: int, width: int, blocks: int, *refs: Any) -> None:
    """Computes some rows; `around` holds the gradient of the convolution's output there, with a border of one."""
    bottleneck, made, made_above, made_below, read, read_above, read_below = refs[:7]
    total_factor, x_factor, constant, mean, rstd, scale, bias, taps = refs[7:15]
    masked, grad_scale, grad_bias, grad_kernel, around = refs[15:]
    block, dtype, kind = pl.program_id(1), masked.dtype, grad_kernel.dtype
    tiles.clear_at_start(grad_scale, grad_bias, grad_kernel)
    factors = total_factor[...], x_factor[...], constant[...]

    def raw(made: jax.Array, read: jax.Array) -> jax.Array:
        return (factors[0] * made.astype(kind) + factors[1] * read.astype(kind) + factors[2]).astype(dtype)

    border = jnp.zeros_like(around[:, 0])
    around[:, 0], around[:, width + 1] = border, border

    def place(row: int, made: Any, read: Any, is_inside: Any = True) -> None:
        def one(position: Any, row: int) -> int:
            values = raw(made[position], read[position])
            around[row, position + 1] = jnp.where(is_inside, values, jnp.zeros_like(values))
            return row

        lax.fori_loop(0, width, one, row)

    place(0, made_above.at[0], read_above.at[0], block > 0)
    place(rows + 1, made_below.at[0], read_below.at[0], block < blocks - 1)
    for row in range(rows):
        place(row + 1, made.at[row], read.at[row])

    kernel = taps[...]
    norm = mean[...], rstd[...], scale[...], bias[...]

    def step(position: Any, row: int) -> int:
        normalized = ((bottleneck[row, position].astype(kind) - norm[0]) * norm[1]).astype(dtype).astype(kind)
        activation = jnp.maximum(norm[2] * normalized + norm[3], 0).astype(dtype)
        # Each neighbor reads this position through the opposite tap.
        gradient = jnp.concatenate(
            [around[row + 2 - y, position + 2 - x] for y in range(_SIDE) for x in range(_SIDE)], axis=0
        )
        grad_activation = tiles.dot(kernel, gradient, (1, 0))
        grad_activation = jnp.where(activation > 0, grad_activation, jnp.zeros_like(grad_activation))
        masked[row, position] = grad_activation.astype(dtype)
        grad_bias[...] += grad_activation
        grad_scale[...] += grad_activation * normalized
        grad_kernel[...] += tiles.dot(activation, gradient, (1, 1))
        return row

    for row in range(rows):
        lax.fori_loop(0, width, step, row)
