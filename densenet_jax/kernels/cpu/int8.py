"""Products of integers of 8 bits, which are summed in 32: kernels as native/products.h reads them, and their inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from densenet_jax.kernels.cpu import bfloat16

_MOST_WEIGHT, _MOST_INPUT = 127, 255
_TOGETHER = 4  # inputs that a product reads at once


def is_packable(kernel: Any, groups: int = 1) -> bool:
    """Whether `pack` takes the kernel: fours of inputs, without groups."""
    is_known = groups == 1 and kernel.dtype == np.float32 and kernel.shape[0] in (1, 3)
    return is_known and kernel.shape[2] % _TOGETHER == 0


def pack(kernel: Any) -> tuple[Any, Any]:
    """Rounds a kernel for which `is_packable` to int8, with a scale for each output, laid out for the products.

    Returns:
        int8 values in the kernel's shape, and float32 scales [outputs]; a NumPy array gives NumPy arrays.
    """
    arrays = jnp if isinstance(kernel, jax.Array) else np
    scales = abs(kernel).max(axis=(0, 1, 2), keepdims=True) * np.float32(1 / _MOST_WEIGHT)
    values = arrays.round(kernel / arrays.where(scales > 0, scales, np.float32(1)))
    return bfloat16.lay_out(values.astype(jnp.int8), _TOGETHER), scales.ravel()


def unpack(kernel: Int8[Array, "k k c o"], scales: Float[Array, " o"]) -> Float[Array, "k k c o"]:
    """Returns the rounded weights in their own order."""
    return bfloat16.unpack(kernel, _TOGETHER).astype(scales.dtype) * scales[None, None, None, :]


def round_inputs(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h w c"]:
    """Rounds inputs >= 0 of a kernel of that size to 0 to 255 times a scale, one a pixel for size 1, else one an image.

    The gradient is that of x.
    """
    if size > 1:
        x = x.astype(jnp.bfloat16).astype(x.dtype)
    most = jnp.max(x, axis=3 if size == 1 else (1, 2, 3), keepdims=True)
    rounded = jnp.round(x * (_MOST_INPUT / jnp.where(most > 0, most, 1))) * (most / _MOST_INPUT)
    return x + lax.stop_gradient(rounded - x)
