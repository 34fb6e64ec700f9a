"""Where a dense block keeps its normalized maps: one buffer that layers read the front of, or an array a layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from densenet_jax.kernels.shard import on_each_device
from densenet_jax.models.arithmetic import Arithmetic


def begin(first: Array, width: int, arithmetic: Arithmetic) -> Any:
    """The storage of a block's normalized maps, holding the first."""
    if arithmetic.storage == "arrays":
        return (first,)
    if arithmetic.begins_unwritten:

        def unwritten(first: Array, groups: int) -> tuple[Array]:
            return (lax.dynamic_update_slice_in_dim(lax.empty((*first.shape[:3], width), first.dtype), first, 0, 3),)

        return on_each_device(unwritten, arithmetic.mesh, 1, (True,), ("example",))(first)[0]
    return jnp.pad(first, ((0, 0), (0, 0), (0, 0), (0, width - first.shape[-1])))


def put(maps: Any, new: Array, start: int) -> Any:
    """The storage with new maps behind the first `start` channels."""
    if isinstance(maps, tuple):
        return (*maps, new)
    return lax.dynamic_update_slice_in_dim(maps, new, start, axis=3)


def readable(maps: Any, width: int, arithmetic: Arithmetic) -> Array:
    """The first channels; where the library reads, which knows how many it wants, what lies behind them as well."""
    return maps if arithmetic.library and not isinstance(maps, tuple) else front(maps, width)


def front(maps: Any, width: int) -> Array:
    """The first channels."""
    if not isinstance(maps, tuple):
        return maps[..., :width]
    ends = np.cumsum([piece.shape[-1] for piece in maps])
    count = int(np.searchsorted(ends, width)) + 1
    return jnp.concatenate(maps[:count], axis=-1)
