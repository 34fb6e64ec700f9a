"""Computes norm, ReLU and pooling, with derivatives that keep no intermediate of the full size.

A DenseNet pools after a norm's ReLU in two places: the maximum in the stem, the average in the transitions.

- relu(scale * x + bias) with scale >= 0 is monotone, so the maximum may be taken first, and only a quarter of the
  values be normalized. Where a scale is negative, the convolution before it gives the negated channel.
- The 1x1 convolution of a transition and the average after it are linear and commute: the average is taken first,
  for a quarter of the products, or, where bytes cost more than products (TPU), in the convolution's kernel.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from densenet_jax.dtypes import wide
from densenet_jax.models.fused.norm import Normalization
from densenet_jax.models.fused.norm_relu_conv import NormReluConv, norm_relu, norm_relu_gradients, sum_by_group
from densenet_jax.models.layers import (
    BatchNorm,
    BatchStats,
    Convolution,
    NormOptions,
    compute_stats,
    convolve,
    fold_running,
    max_pool,
    normalize,
    scale_shift,
)

if TYPE_CHECKING:
    from densenet_jax.models.fused.backend import Backend

_NOWHERE = -1


def norm_relu_conv_pool(x: Float[Array, "b h w c"], conv: NormReluConv, backend: Backend) -> Float[Array, "b h2 w2 o"]:
    """Returns the 2x2 mean at stride 2 of relu(scale * x + bias), convolved by a 1x1 kernel, in x's dtype.

    An odd last row or column is left out.
    """
    if backend.pool_in_conv:
        return _conv_with_pool(x, conv)
    return backend.convolve_same(_norm_relu_average(x, conv.scale, conv.bias), conv.kernel)


@jax.custom_vjp
def _norm_relu_average(x: Array, scale: Array, bias: Array) -> Float[Array, "b h2 w2 c"]:
    activation = norm_relu(x, scale, bias).astype(wide(x.dtype))
    height, width = (size // 2 * 2 for size in x.shape[1:3])
    corners = [activation[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return (sum(corners[1:], corners[0]) * 0.25).astype(x.dtype)


def _average_forward(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _norm_relu_average(x, scale, bias), (x, scale, bias)


def _average_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, scale, bias = saved
    batch, height, width, channels = gradient.shape
    spread = jnp.broadcast_to(gradient[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    spread = spread.reshape(batch, 2 * height, 2 * width, channels) * jnp.asarray(0.25, x.dtype)
    spread = jnp.pad(spread, ((0, 0), (0, x.shape[1] - 2 * height), (0, x.shape[2] - 2 * width), (0, 0)))
    return _norm_relu_gradients(x, scale, bias, norm_relu(x, scale, bias), spread)


_norm_relu_average.defvjp(_average_forward, _average_backward)


def _norm_relu_gradients(
    x: Array, scale: Array, bias: Array, activation: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of x, scale and bias in their dtypes."""
    grad_x, grad_scale, grad_bias = norm_relu_gradients(gradient, activation, x, scale, 1)
    return grad_x.astype(x.dtype), grad_scale[0].astype(scale.dtype), grad_bias[0].astype(bias.dtype)


def _pooling_kernel(kernel: Array) -> Float[Array, "2 2 c o"]:
    """Makes the 2x2 kernel that averages and convolves at once: four times the products, no intermediate."""
    return jnp.tile(kernel * 0.25, (2, 2, 1, 1))


_convolve_strided = functools.partial(convolve, stride=2)


@jax.custom_vjp
def _conv_with_pool(x: Array, conv: NormReluConv) -> Array:
    return _convolve_strided(norm_relu(x, conv.scale, conv.bias), _pooling_kernel(conv.kernel))


def _conv_with_pool_forward(x: Array, conv: NormReluConv) -> tuple[Array, tuple[Array, NormReluConv]]:
    return _conv_with_pool(x, conv), (x, conv)


def _conv_with_pool_backward(saved: tuple[Array, NormReluConv], gradient: Array) -> tuple[Array, NormReluConv]:
    x, (scale, bias, kernel) = saved
    activation = norm_relu(x, scale, bias)
    _, pullback = jax.vjp(_convolve_strided, activation, _pooling_kernel(kernel).astype(x.dtype))
    grad_activation, grad_pooling = pullback(gradient)
    grad_kernel = grad_pooling.astype(wide(x.dtype)).sum(axis=(0, 1), keepdims=True) * 0.25
    grad_x, grad_scale, grad_bias = _norm_relu_gradients(x, scale, bias, activation, grad_activation)
    return grad_x, NormReluConv(grad_scale, grad_bias, grad_kernel.astype(kernel.dtype))


_conv_with_pool.defvjp(_conv_with_pool_forward, _conv_with_pool_backward)


def conv_norm_relu_max_pool(
    convolution: Convolution, norm: BatchNorm, x: Float[Array, "b h w c"], train: bool, backend: Backend
) -> Float[Array, "b h2 w2 o"]:
    """Computes max_pool(relu(norm(convolution(x)))), the maximum first."""
    x, kernel = x.astype(convolution.dtype), convolution.kernel
    if norm.options.folded:  # whose scale is the kernel's
        y = backend.convolve_stem(x, kernel, convolution.stride)
        return jax.nn.relu(norm(max_pool(y, repeat_border=True), train))
    arrays = norm.arrays()
    signs = lax.stop_gradient(jnp.where(arrays.scale < 0, -1, 1).astype(arrays.scale.dtype))
    kernel = kernel * signs.astype(kernel.dtype)[None, None, None, :]
    y = backend.convolve_stem(x, kernel, convolution.stride)
    if not train or arrays.frozen:
        scale, bias = fold_running(arrays, norm.options.epsilon)
        return jax.nn.relu(scale_shift(backend.max_pool(y), scale * signs.astype(scale.dtype), bias, norm.dtype))
    means = signs.astype(arrays.mean.dtype)
    out, stats = _norm_relu_max_pool(norm.options, backend, y, arrays.scale * signs, arrays.bias, arrays.mean * means)
    norm.update_running(stats._replace(mean=stats.mean * means[None, :]), y.size // y.shape[-1])
    return out.astype(norm.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_relu_max_pool(
    options: NormOptions,
    backend: Backend,
    y: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    shift: Float[Array, " c"],
) -> tuple[Float[Array, "b h2 w2 c"], BatchStats]:
    """Returns max_pool(relu(batch norm of y)) in y's dtype, and y's statistics; no scale is below 0."""
    return _max_forward(options, backend, y, scale, bias, shift)[0]


def _max_forward(
    options: NormOptions, backend: Backend, y: Array, scale: Array, bias: Array, shift: Array
) -> tuple[tuple[Array, BatchStats], tuple]:
    stats = compute_stats(y, options.group_size, shift)
    pooled, index = backend.max_pool_forward(y)
    out = jax.nn.relu(scale_shift(normalize(pooled, stats, options.epsilon), scale, bias, y.dtype))
    return (out, stats), (y, pooled, index, stats, scale, bias)


def _max_backward(
    options: NormOptions, backend: Backend, saved: tuple, cotangents: tuple[Array, BatchStats]
) -> tuple[Array, Array, Array, None]:
    y, pooled, index, stats, scale, bias = saved
    gradient, grad_stats = cotangents
    x_hat = normalize(pooled, stats, options.epsilon)
    dtype, groups = x_hat.dtype, stats.mean.shape[0]
    relu_mask = scale_shift(x_hat, scale, bias, y.dtype) > 0
    gradient = jnp.where(relu_mask, gradient.astype(dtype), jnp.zeros_like(x_hat))
    grad_scale, grad_bias = sum_by_group(gradient * x_hat, groups), sum_by_group(gradient, groups)
    factor = scale.astype(dtype)[None, :]
    grad_pooled = (gradient * factor[:, None, None, :]).astype(y.dtype)
    spread = backend.max_pool_backward(y, index, grad_pooled)
    # Each pooled gradient goes to one value of y, so the sums over y are the sums over the maxima.
    sums = (grad_bias * factor, grad_scale * factor)
    y_hat = normalize(y, stats, options.epsilon)
    grad_y = Normalization(stats, options.epsilon, grad_stats).gradient(spread, y_hat, sums).astype(y.dtype)
    return grad_y, grad_scale.sum(axis=0).astype(scale.dtype), grad_bias.sum(axis=0).astype(bias.dtype), None


_norm_relu_max_pool.defvjp(_max_forward, _max_backward)


def max_pool_with_index(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 c"], Int8[Array, "b h2 w2 c"]]:
    """Returns `layers.max_pool` of x at stride 2, and where each window has its first maximum: row by row, 0 to 8.

    XLA's gradient of a maximum compares every window again and scatters; from a byte for each window it is one pass
    over the feature map, which fuses with whatever else reads and writes it.
    """
    least = jnp.asarray(-jnp.inf, x.dtype)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=least)
    ends = [2 * ((side + 1) // 2) - 1 for side in x.shape[1:3]]
    starts = ((row, column) for row in range(3) for column in range(3))
    values = (padded[:, row : row + ends[0] : 2, column : column + ends[1] : 2] for row, column in starts)
    best = next(values)
    index = jnp.zeros(best.shape, jnp.int8)
    for position, value in enumerate(values, 1):
        index = jnp.where(value > best, jnp.int8(position), index)
        best = jnp.maximum(best, value)
    return best, index


def max_pool_gradient(
    index: Int8[Array, "b h2 w2 c"], gradient: Float[Array, "b h2 w2 c"], height: int, width: int
) -> Float[Array, "b h w c"]:
    """Returns the gradient of the pooled feature map, height x width, in the gradient's dtype.

    Along each side an even position lies in the middle of one window, an odd one at the end of a window and at the
    start of the next.
    """
    index = jnp.pad(index, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=_NOWHERE)
    gradient = jnp.pad(gradient, ((0, 0), (0, 1), (0, 1), (0, 0)))
    total = jnp.zeros((), gradient.dtype)
    for down in (0, 1):
        for right in (0, 1):
            row, column = _position_in_window(height, down)[:, None], _position_in_window(width, right)[None, :]
            position = jnp.where((row < 0) | (column < 0), jnp.int8(_NOWHERE - 1), 3 * row + column)
            repeated_gradient = _repeat_windows(gradient, down, right, height, width)
            is_maximum = _repeat_windows(index, down, right, height, width) == position[None, :, :, None]
            total = total + jnp.where(is_maximum, repeated_gradient, jnp.zeros_like(repeated_gradient))
    return total


def _position_in_window(size: int, shift: int) -> Int8[Array, " n"]:
    """Returns the row of window i + shift that positions 2 i and 2 i + 1 are; negative outside the window."""
    odd = jnp.arange(size) % 2
    return (jnp.where(odd == 1, 0, _NOWHERE) if shift else odd + 1).astype(jnp.int8)


def _repeat_windows(windows: Array, down: int, right: int, height: int, width: int) -> Array:
    """Returns the value of window i + shift for positions 2 i and 2 i + 1."""
    batch, rows, columns, channels = windows.shape
    rows, columns = rows - 1, columns - 1
    windows = windows[:, down : down + rows, right : right + columns]
    repeated = jnp.broadcast_to(windows[:, :, None, :, None, :], (batch, rows, 2, columns, 2, channels))
    return repeated.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]
