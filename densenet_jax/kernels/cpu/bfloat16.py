"""Kernels for products of bfloat16 values, which are summed in float32, as native/bfloat16.h reads them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_CHUNK = 16  # outputs that lie together


def is_packable(kernel: Any, groups: int = 1) -> bool:
    """Whether `pack` keeps the kernel's shape: pairs of inputs, without groups."""
    return groups == 1 and kernel.dtype == np.float32 and kernel.shape[0] in (1, 3) and kernel.shape[2] % 2 == 0


def pack(kernel: Any) -> Any:
    """Rounds a kernel for which `is_packable` to bfloat16 and lays it out for the products, in the same shape.

    The order is [16 outputs, or the last few][taps][pairs of inputs][outputs][2]. NumPy for an array of NumPy's.
    """
    arrays = jnp if isinstance(kernel, jax.Array) else np
    *taps, inputs, outputs = kernel.shape
    pairs = kernel.astype(jnp.bfloat16).reshape(math.prod(taps), inputs // 2, 2, outputs).swapaxes(2, 3)
    whole = outputs // _CHUNK * _CHUNK
    chunks = pairs[:, :, :whole].reshape(*pairs.shape[:2], -1, _CHUNK, 2).transpose(2, 0, 1, 3, 4)
    return arrays.concatenate([chunks.ravel(), pairs[:, :, whole:].ravel()]).reshape(kernel.shape)


def unpack(kernel: Array) -> Array:
    """Undoes the order of `pack`."""
    *taps, inputs, outputs = kernel.shape
    shape, whole = (math.prod(taps), inputs // 2), outputs // _CHUNK * _CHUNK
    chunks, rest = jnp.split(kernel.ravel(), [kernel.size // outputs * whole])
    chunks = chunks.reshape(-1, *shape, _CHUNK, 2).transpose(1, 2, 0, 3, 4).reshape(*shape, whole, 2)
    pairs = jnp.concatenate([chunks, rest.reshape(*shape, outputs - whole, 2)], axis=2)
    return pairs.swapaxes(2, 3).reshape(kernel.shape)
