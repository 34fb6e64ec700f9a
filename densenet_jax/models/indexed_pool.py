"""3x3 maxima at stride 2 that keep which value of each window was taken, so that the gradient is not searched for.

XLA's gradient of a maximum compares every window again and scatters; from a byte for each window it is one pass over
the map, which fuses with whatever else reads and writes the map.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

_NOWHERE = -1


def max_pool_with_index(x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 c"], Int8[Array, "b h2 w2 c"]]:
    """`layers.max_pool` of x, and the first place, row by row from 0 to 8, where each window has its maximum."""
    least = jnp.asarray(-jnp.inf, x.dtype)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=least)
    ends = [2 * ((side + 1) // 2) - 1 for side in x.shape[1:3]]
    best = index = None
    for row in range(3):
        for column in range(3):
            value = padded[:, row : row + ends[0] : 2, column : column + ends[1] : 2]
            if best is None or index is None:
                best, index = value, jnp.zeros(value.shape, jnp.int8)
                continue
            index = jnp.where(value > best, jnp.int8(3 * row + column), index)
            best = jnp.maximum(best, value)
    assert best is not None
    assert index is not None
    return best, index


def max_pool_gradient(
    index: Int8[Array, "b h2 w2 c"], gradient: Float[Array, "b h2 w2 c"], height: int, width: int
) -> Float[Array, "b h w c"]:
    """The gradient of what was pooled, of that size, in the gradient's dtype.

    Along each side an even place lies in the middle of one window, an odd one at the end of a window and at the start
    of the next.
    """
    index = jnp.pad(index, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=_NOWHERE)
    gradient = jnp.pad(gradient, ((0, 0), (0, 1), (0, 1), (0, 0)))
    total = jnp.zeros((), gradient.dtype)
    for down in (0, 1):
        for right in (0, 1):
            row, column = _place_in_window(height, down)[:, None], _place_in_window(width, right)[None, :]
            place = jnp.where((row < 0) | (column < 0), jnp.int8(_NOWHERE - 1), 3 * row + column)
            of_windows = _spread(gradient, down, right, height, width)
            is_taken = _spread(index, down, right, height, width) == place[None, :, :, None]
            total = total + jnp.where(is_taken, of_windows, jnp.zeros_like(of_windows))
    return total


def _place_in_window(size: int, shift: int) -> Int8[Array, " n"]:
    """Which row of window i + shift place 2 i or 2 i + 1 is; negative where it is none."""
    odd = jnp.arange(size) % 2
    return (jnp.where(odd == 1, 0, _NOWHERE) if shift else odd + 1).astype(jnp.int8)


def _spread(windows: Array, down: int, right: int, height: int, width: int) -> Array:
    """For every place 2 i or 2 i + 1 the value of window i + shift."""
    batch, rows, columns, channels = windows.shape
    rows, columns = rows - 1, columns - 1
    windows = windows[:, down : down + rows, right : right + columns]
    wide = jnp.broadcast_to(windows[:, :, None, :, None, :], (batch, rows, 2, columns, 2, channels))
    return wide.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]
