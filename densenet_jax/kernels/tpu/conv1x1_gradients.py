"""Gradients of norm_relu_conv with a dense layer's 1x1 kernel on a TPU: one kernel that reads everything once.

XLA computes two products here. Both read the bottleneck, the gradient after its norm and x_hat, and each computes the
norm's derivative again. This kernel computes it once, takes both products, and adds the gradient of x_hat, in place,
to the buffer where those of all layers add up. It recomputes the bottleneck from x_hat: a third product instead of
another array to read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from densenet_jax.dtypes import wide
from densenet_jax.kernels.dispatch import PallasOperation
from densenet_jax.kernels.tpu import tiles

Gradients = tuple[Float[Array, "b h w c2"], Float[Array, "g c"], Float[Array, "g c"], Float[Array, "c o"]]


@PallasOperation
def conv1x1_gradients(
    total: Float[Array, "b h w c2"],
    x: Float[Array, "b h w c2"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    kernel: Float[Array, "c o"],
    masked: Float[Array, "b h w o"],
    coefficients: Float[Array, "g 3 o"],
) -> Gradients:
    """Computes the gradients of relu(scale * x + bias) @ kernel for x's first c columns, that of x added into total.

    Args:
        masked: the gradient that `conv3x3_gradients` returns.
        coefficients: for each group of examples a, b, c with a * masked + b * output + c the output's gradient.

    Returns:
        The new total, with the columns from c on unchanged; the gradients of scale and bias for each group and of the
        kernel, in float32 or wider.
    """
    (examples, *_), (channels, _), kind = x.shape, kernel.shape, wide(x.dtype)
    groups = coefficients.shape[0]
    kernel, front = kernel.astype(x.dtype), x[..., :channels].astype(kind)
    scales, biases = (values.astype(kind)[None, None, None, :] for values in (scale, bias))
    activation = jnp.maximum(scales * front + biases, 0).astype(x.dtype)
    bottleneck = lax.dot_general(activation, kernel, (((3,), (0,)), ((), ())), preferred_element_type=kind)
    bottleneck = bottleneck.astype(x.dtype)
    factors = jnp.repeat(coefficients.astype(kind), examples // groups, axis=0).swapaxes(0, 1)[:, :, None, None, :]
    gradient = factors[0] * masked.astype(kind) + factors[1] * bottleneck.astype(kind) + factors[2]
    gradient = gradient.astype(x.dtype)
    grad_activation = lax.dot_general(gradient, kernel, (((3,), (1,)), ((), ())), preferred_element_type=kind)
    grad_activation = jnp.where(activation > 0, grad_activation, jnp.zeros_like(grad_activation))
    added = (total[..., :channels].astype(kind) + scales * grad_activation).astype(total.dtype)
    by_group = (groups, -1, channels)
    return (
        lax.dynamic_update_slice_in_dim(total, added, 0, axis=3),
        (grad_activation * front).reshape(by_group).sum(axis=1),
        grad_activation.reshape(by_group).sum(axis=1),
        lax.dot_general(activation, gradient, (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=kind),
    )


def fits(x: jax.ShapeDtypeStruct | Array, kernel_shape: tuple[int, int]) -> bool:
    """Whether the kernel takes such operands: x as in `conv1x1_gradients`, or its shape and dtype."""
    channels, outputs = kernel_shape
    examples, height, width, _ = x.shape
    return (
        examples * height * width > 0
        and examples % tiles.LANES == 0
        and channels % tiles.SUBLANES == 0
        and outputs % tiles.SUBLANES == 0
        and _on_chip_bytes(1, channels, outputs, x.dtype) <= tiles.ON_CHIP_BYTES
    )


def _on_chip_bytes(positions: int, channels: int, outputs: int, dtype: Any) -> int:
    """Returns the bytes that this many positions need, double buffering included."""
    maps = 2 * positions * tiles.LANES * jnp.dtype(dtype).itemsize * (3 * channels + outputs)
    sums, in_the_making = 2 * (outputs + 2 * tiles.LANES), 4 * tiles.LANES
    return maps + jnp.dtype(wide(dtype)).itemsize * channels * (sums + in_the_making)


def _supports(total: Any, x: Any, scale: Any, bias: Any, kernel: Any, masked: Any, coefficients: Any) -> bool:
    return coefficients.shape[0] == 1 and fits(x, kernel.shape)


@conv1x1_gradients.define_kernel("tpu", _supports)
def _call_kernel(*operands: Array, most_positions: int | None = None, interpret: bool = False) -> Gradients:
    """Calls the kernel for one group of examples, with at most most_positions a program."""
    total, x, scale, bias, kernel, masked, coefficients = operands
    examples, height, width, _ = x.shape
    channels, outputs = kernel.shape
    lanes, kind, dtype = min(tiles.LANES, examples), wide(x.dtype), x.dtype
    side = tiles.part_of(height * width, most_positions, lambda side: _on_chip_bytes(side, channels, outputs, dtype))

    def flat(x: Array) -> Array:
        return tiles.examples_last(x).reshape(height * width, -1, examples)

    def own(channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((side, channels, lanes), lambda n, i: (i, 0, n))

    positions = height * width * examples
    moved = positions * dtype.itemsize * (3 * channels + outputs)
    added, grad_scale, grad_bias, grad_kernel = pl.pallas_call(
        functools.partial(_kernel, side),
        out_shape=(
            jax.ShapeDtypeStruct((height * width, total.shape[-1], examples), total.dtype),
            *[jax.ShapeDtypeStruct((channels, lanes), kind)] * 2,
            jax.ShapeDtypeStruct((channels, outputs), kind),
        ),
        grid=(examples // lanes, height * width // side),
        in_specs=[
            *[own(channels)] * 2,
            *[tiles.whole(channels, 1)] * 2,
            tiles.whole(channels, outputs),
            own(outputs),
            *[tiles.whole(outputs, 1)] * 3,
        ],
        out_specs=(own(channels), *[tiles.whole(channels, lanes)] * 2, tiles.whole(channels, outputs)),
        input_output_aliases={0: 0},
        compiler_params=tiles.PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=6 * positions * channels * outputs, transcendentals=0, bytes_accessed=moved
        ),
        interpret=interpret,
        name="dense_layer_conv1x1_gradients",
    )(
        flat(total),
        flat(x),
        tiles.column(scale, kind),
        tiles.column(bias, kind),
        kernel.astype(dtype),
        flat(masked),
        *(tiles.column(values, kind) for values in coefficients[0]),
    )
    return (
        tiles.examples_first(added.reshape(height, width, -1, examples)),
        grad_scale.sum(axis=1)[None],
        grad_bias.sum(axis=1)[None],
        grad_kernel,
    )


def _kernel(side: int, *refs: Any) -> None:
    total, x, scale, bias, kernel, masked, masked_factor, bottleneck_factor, constant = refs[:9]
    added, *sums = refs[9:]
    grad_scale, grad_bias, grad_kernel = sums
    dtype, kind = x.dtype, grad_kernel.dtype
    tiles.clear_at_start(*sums)
    scales, biases, weights = scale[...], bias[...], kernel[...]
    factors = masked_factor[...], bottleneck_factor[...], constant[...]

    def step(position: Any, carry: Any) -> Any:
        front = x[position].astype(kind)
        activation = jnp.maximum(scales * front + biases, 0).astype(dtype)
        bottleneck = tiles.dot(weights, activation, (0, 0)).astype(dtype)
        gradient = factors[0] * masked[position].astype(kind) + factors[1] * bottleneck.astype(kind) + factors[2]
        gradient = gradient.astype(dtype)
        grad_activation = tiles.dot(weights, gradient, (1, 0))
        grad_activation = jnp.where(activation > 0, grad_activation, jnp.zeros_like(grad_activation))
        added[position] = (total[position].astype(kind) + scales * grad_activation).astype(added.dtype)
        grad_bias[...] += grad_activation
        grad_scale[...] += grad_activation * front
        grad_kernel[...] += tiles.dot(activation, gradient, (1, 1))
        return carry

    lax.fori_loop(0, side, step, 0)
