"""Norm and ReLU together with the pooling behind them, each with a derivative that keeps nothing of the map's size.

A DenseNet pools twice right behind a norm's ReLU: by maximum in the stem, by average in the transitions. Both get
smaller maps from the ReLU before anything else reads them:

- A rectified affine map whose scale is not negative is monotone, so the maximum may be taken first and normed then, of
  a quarter of the values. Where a scale is negative, the convolution before it gives the negated channel.
- The 1x1 convolution of a transition and the average behind it are linear and exchange: the average is taken first,
  for a quarter of the products, or, where bytes are dearer than products (TPU), in the convolution's kernel.

The functions are those of `layers.max_pool` and `layers.average_pool` behind a batch norm, up to rounding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.dtypes import wide
from densenet_jax.models.arithmetic import Arithmetic, rearranges_stem
from densenet_jax.models.indexed_pool import max_pool_gradient, max_pool_with_index
from densenet_jax.models.layers import (
    BatchNorm,
    Convolution,
    Moments,
    NormOptions,
    batch_moments,
    convolve,
    fold_running,
    max_pool,
    normalize,
    scale_shift,
)
from densenet_jax.models.normalization import Normalization
from densenet_jax.models.readers import (
    Reader,
    contract,
    rectifier_gradients,
    rectify,
    sum_by_group,
)


def read_pooled(x: Float[Array, "b h w c"], reader: Reader, arithmetic: Arithmetic) -> Float[Array, "b h2 w2 o"]:
    """The 2x2 mean at stride 2 of relu(scale * x + bias), convolved by a 1x1 kernel, in x's dtype.

    An odd last row or column is left out.
    """
    if arithmetic.pooling == "kernel":
        return _read_strided(x, reader)
    return contract(_rectified_average(x, reader.scale, reader.bias), reader.kernel, arithmetic)


@jax.custom_vjp
def _rectified_average(x: Array, scale: Array, bias: Array) -> Float[Array, "b h2 w2 c"]:
    rectified = rectify(x, scale, bias).astype(wide(x.dtype))
    height, width = (size // 2 * 2 for size in x.shape[1:3])
    corners = [rectified[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return (sum(corners[1:], corners[0]) * 0.25).astype(x.dtype)


def _average_forward(x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _rectified_average(x, scale, bias), (x, scale, bias)


def _average_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, scale, bias = saved
    batch, height, width, channels = gradient.shape
    spread = jnp.broadcast_to(gradient[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    spread = spread.reshape(batch, 2 * height, 2 * width, channels) * jnp.asarray(0.25, x.dtype)
    spread = jnp.pad(spread, ((0, 0), (0, x.shape[1] - 2 * height), (0, x.shape[2] - 2 * width), (0, 0)))
    return _rectifier_gradients(x, scale, bias, rectify(x, scale, bias), spread)


_rectified_average.defvjp(_average_forward, _average_backward)


def _rectifier_gradients(x: Array, scale: Array, bias: Array, rectified: Array, gradient: Array) -> tuple:
    """From the gradient of relu(scale * x + bias) to those of x, scale and bias, in their dtypes."""
    of_x, of_scale, of_bias = rectifier_gradients(gradient, rectified, x, scale, 1)
    return of_x.astype(x.dtype), of_scale[0].astype(scale.dtype), of_bias[0].astype(bias.dtype)


def _strided(rectified: Array, quarters: Array) -> Array:
    return convolve(rectified, quarters, stride=2)


def _quarters(kernel: Array) -> Float[Array, "2 2 c o"]:
    """The 2x2 kernel that takes the mean and the 1x1 convolution at once: four times the products, no map between."""
    return jnp.tile(kernel * 0.25, (2, 2, 1, 1))


@jax.custom_vjp
def _read_strided(x: Array, reader: Reader) -> Array:
    return _strided(rectify(x, reader.scale, reader.bias), _quarters(reader.kernel))


def _strided_forward(x: Array, reader: Reader) -> tuple[Array, tuple[Array, Reader]]:
    return _read_strided(x, reader), (x, reader)


def _strided_backward(saved: tuple[Array, Reader], gradient: Array) -> tuple[Array, Reader]:
    x, (scale, bias, kernel) = saved
    rectified = rectify(x, scale, bias)
    _, pullback = jax.vjp(_strided, rectified, _quarters(kernel).astype(x.dtype))
    of_rectified, of_quarters = pullback(gradient)
    of_kernel = of_quarters.astype(wide(x.dtype)).sum(axis=(0, 1), keepdims=True) * 0.25
    of_x, of_scale, of_bias = _rectifier_gradients(x, scale, bias, rectified, of_rectified)
    return of_x, Reader(of_scale, of_bias, of_kernel.astype(kernel.dtype))


_read_strided.defvjp(_strided_forward, _strided_backward)


def norm_relu_max_pool(
    convolution: Convolution, norm: BatchNorm, x: Float[Array, "b h w c"], train: bool, arithmetic: Arithmetic
) -> Float[Array, "b h2 w2 o"]:
    """max_pool(relu(norm(convolution(x)))): the maximum taken first, then normed.

    Args:
      convolution: a bound module.
      norm: likewise; in training its running statistics take in the moments.
      x: what is convolved.
      train: batch statistics instead of running ones.
      arithmetic: how.
    """
    if norm.options.folded:
        return jax.nn.relu(norm(max_pool(convolution(x), repeat_border=True), train))  # its scale is the kernel's
    arrays = norm.arrays()
    signs = lax.stop_gradient(jnp.where(arrays.scale < 0, -1, 1).astype(arrays.scale.dtype))
    y = convolution(x, signs)
    if not train or arrays.frozen:
        scale, bias = fold_running(arrays, norm.options.epsilon)
        return jax.nn.relu(scale_shift(max_pool(y), scale * signs.astype(scale.dtype), bias, norm.dtype))
    means = signs.astype(arrays.mean.dtype)
    by_index = rearranges_stem(arithmetic)
    out, moments = _max_pooled(norm.options, by_index, y, arrays.scale * signs, arrays.bias, arrays.mean * means)
    norm.record(moments._replace(mean=moments.mean * means[None, :]), y.size // y.shape[-1] // moments.mean.shape[0])
    return out.astype(norm.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _max_pooled(
    options: NormOptions,
    by_index: bool,
    y: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    shift: Float[Array, " c"],
) -> tuple[Float[Array, "b h2 w2 c"], Moments]:
    """max_pool(relu(batch norm of y)) in y's dtype, and y's moments; no scale is below 0."""
    return _max_forward(options, by_index, y, scale, bias, shift)[0]


def _max_forward(options: NormOptions, by_index: bool, y: Array, scale: Array, bias: Array, shift: Array) -> tuple:
    moments = batch_moments(y, options.group_size, shift)
    pooled, index = max_pool_with_index(y) if by_index else (max_pool(y), None)
    out = jax.nn.relu(scale_shift(normalize(pooled, moments, options.epsilon), scale, bias, y.dtype))
    return (out, moments), (y, pooled, index, moments, scale, bias)


def _max_backward(options: NormOptions, by_index: bool, saved: tuple, cotangents: tuple[Array, Moments]) -> tuple:
    y, pooled, index, moments, scale, bias = saved
    gradient, of_moments = cotangents
    normalized = normalize(pooled, moments, options.epsilon)
    kind, groups = normalized.dtype, moments.mean.shape[0]
    is_open = scale_shift(normalized, scale, bias, y.dtype) > 0
    gradient = jnp.where(is_open, gradient.astype(kind), jnp.zeros_like(normalized))
    of_scale, of_bias = sum_by_group(gradient * normalized, groups), sum_by_group(gradient, groups)
    factor = scale.astype(kind)[None, :]
    of_pooled = (gradient * factor[:, None, None, :]).astype(y.dtype)
    if by_index:  # each is read by four places, for which it is not to be computed again
        spread = max_pool_gradient(index, lax.optimization_barrier(of_pooled), *y.shape[1:3])
    else:
        (spread,) = jax.vjp(max_pool, y)[1](of_pooled)
    # Every pooled gradient went to one value of y, so that the sums over y are those over what was pooled.
    sums = (of_bias * factor, of_scale * factor)
    whole = normalize(y, moments, options.epsilon)
    of_y = Normalization(moments, options.epsilon, of_moments).gradient(spread, whole, sums)
    return of_y.astype(y.dtype), of_scale.sum(axis=0).astype(scale.dtype), of_bias.sum(axis=0).astype(bias.dtype), None


_max_pooled.defvjp(_max_forward, _max_backward)
