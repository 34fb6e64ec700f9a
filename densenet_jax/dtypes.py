"""Chooses the dtypes to compute in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

DType = Any


def wide(dtype: DType) -> DType:
    """Returns the dtype for sums and scales: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)
