"""Products of bfloat16 values, which are summed in float32: kernels as native/products.h reads them, and the stem."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu.convolution import plain_convolve
from densenet_jax.kernels.cpu.library import bfloat16_products
from densenet_jax.kernels.cpu.primitive import call_kernel, define, have_static_sizes, is_available

_CHUNK = 16  # outputs that lie together
_MOST_TAPS, _MOST_INPUTS = 9, 32  # of a stem: rows of the kernel, values of a row


def is_packable(kernel: Any, groups: int = 1) -> bool:
    """Whether `pack` keeps the kernel's shape: pairs of inputs, without groups."""
    return groups == 1 and kernel.dtype == np.float32 and kernel.shape[0] in (1, 3) and kernel.shape[2] % 2 == 0


def pack(kernel: Any) -> Any:
    """Rounds a kernel for which `is_packable` to bfloat16 and lays it out for the products, in the same shape."""
    return lay_out(kernel.astype(jnp.bfloat16), 2)


def lay_out(kernel: Any, together: int) -> Any:
    """Lays a kernel out for products that read `together` inputs at once, in the same shape.

    The order, the slowest first: 16 outputs together, or the last few; taps; groups of inputs; outputs; the inputs of a
    group. A NumPy array gives a NumPy array.
    """
    arrays = jnp if isinstance(kernel, jax.Array) else np
    *taps, inputs, outputs = kernel.shape
    groups = kernel.reshape(math.prod(taps), inputs // together, together, outputs).swapaxes(2, 3)
    whole = outputs // _CHUNK * _CHUNK
    chunks = groups[:, :, :whole].reshape(*groups.shape[:2], -1, _CHUNK, together).transpose(2, 0, 1, 3, 4)
    return arrays.concatenate([chunks.ravel(), groups[:, :, whole:].ravel()]).reshape(kernel.shape)


def unpack(kernel: Array, together: int = 2) -> Array:
    """Undoes the order of `lay_out`."""
    *taps, inputs, outputs = kernel.shape
    shape, whole = (math.prod(taps), inputs // together), outputs // _CHUNK * _CHUNK
    chunks, rest = jnp.split(kernel.ravel(), [kernel.size // outputs * whole])
    chunks = chunks.reshape(-1, *shape, _CHUNK, together).transpose(1, 2, 0, 3, 4).reshape(*shape, whole, together)
    groups = jnp.concatenate([chunks, rest.reshape(*shape, outputs - whole, together)], axis=2)
    return groups.swapaxes(2, 3).reshape(kernel.shape)


def is_stem(x: Array, kernel: Array) -> bool:
    """Whether `stem` has a kernel for these operands."""
    size, _, channels, _ = kernel.shape
    fits = size % 2 == 1 and size <= _MOST_TAPS and size * channels <= _MOST_INPUTS
    return fits and x.dtype == kernel.dtype == jnp.float32 and have_static_sizes(x) and is_available()


def plain_stem(x: Array, kernel: Array, scale: Array, bias: Array, *, stride: int) -> Array:
    """Computes `stem` in plain JAX."""
    x, kernel = (array.astype(jnp.bfloat16).astype(array.dtype) for array in (x, kernel))
    y = plain_convolve(x, kernel, stride=stride, padding=kernel.shape[0] // 2)
    y = jax.nn.relu(y * scale[None, None, None, :] + bias[None, None, None, :])
    return nn.max_pool(y, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _lower_stem(ctx: Any, *operands: Any, stride: int) -> Any:
    return call_kernel("stem", ctx, *operands, stride=stride, products=bfloat16_products())


_stem_p = define("stem", plain_stem, _lower_stem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def stem(
    stride: int, x: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"], scale: Array, bias: Array
) -> Float[Array, "b h2 w2 o"]:
    """Computes the 3x3 maxima at stride 2 of relu(scale * y + bias), y the convolution of rounded images."""
    return _stem_p.bind(x, kernel, scale, bias, stride=stride)


def _forward(stride: int, *operands: Array) -> tuple[Array, Any]:
    return jax.vjp(functools.partial(plain_stem, stride=stride), *operands)


stem.defvjp(_forward, lambda stride, pullback, gradient: pullback(gradient))
