"""Kernels for products of bfloat16 values, which are summed in float32, as native/bfloat16.h reads them."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_CHUNK = 16  # outputs that lie together


def is_packable(kernel: Any, groups: int = 1) -> bool:
    """Whether `pack` keeps the kernel's shape: pairs of inputs, without groups."""
    return groups == 1 and kernel.dtype == np.float32 and kernel.shape[0] in (1, 3) and kernel.shape[2] % 2 == 0


@functools.cache
def _order(shape: tuple[int, ...]) -> np.ndarray:
    """Returns the packed order of a kernel's values: [16 outputs at a time][taps][pairs of inputs][outputs][2]."""
    taps, inputs, outputs = shape[0] * shape[1], shape[2], shape[3]
    pairs = np.arange(taps * inputs * outputs).reshape(taps, inputs // 2, 2, outputs).swapaxes(2, 3)
    return np.concatenate([pairs[:, :, i : i + _CHUNK].ravel() for i in range(0, outputs, _CHUNK)])


def pack(kernel: Any) -> np.ndarray:
    """Rounds a kernel for which `is_packable` to bfloat16 and lays it out for the products, in the same shape."""
    rounded = np.asarray(kernel).astype(jnp.bfloat16)
    return rounded.ravel()[_order(rounded.shape)].reshape(rounded.shape)


def unpack(kernel: Array) -> Array:
    """Undoes the order of `pack`."""
    return kernel.ravel()[np.argsort(_order(kernel.shape))].reshape(kernel.shape)
