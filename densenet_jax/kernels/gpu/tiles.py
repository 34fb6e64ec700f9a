"""Tiles for the GPU kernels: their sizes, their edges, and the arithmetic on a tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from densenet_jax.dtypes import wide

LARGEST_OPERAND = 2**31 - 1  # elements; a program's offsets have 32 bits
SMALLEST_SIDE = 16  # of the matrices that a tile multiplies
MOST_OUTPUTS = 512  # per tile, with SMALLEST_SIDE channels


@dataclasses.dataclass(frozen=True)
class Tile:
    """The part of an array that one program computes at a time.

    Attributes:
        rows, channels, outputs: sides, powers of two from SMALLEST_SIDE on.
        warps: groups of 32 threads that share the work.
        stages: tiles in flight: the next ones are loaded while one is multiplied.
    """

    rows: int
    channels: int
    outputs: int
    warps: int = 4
    stages: int = 3


Tiles = Sequence[tuple[int | None, tuple[int, int, int, int]]]


@dataclasses.dataclass(frozen=True)
class RowRanges:
    """Rows in equal groups, each divided into ranges of range_rows (whole tiles), the last one shorter."""

    group_rows: int
    range_rows: int
    ranges: int

    def bounds(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the first row of a range, and the row after its group's last."""
        group = number // self.ranges
        return group * self.group_rows + number % self.ranges * self.range_rows, (group + 1) * self.group_rows


def split_rows(rows: int, groups: int, tile_rows: int, most_ranges: int | None = None) -> RowRanges:
    """Splits rows into ranges of one tile each, or longer ones if those would be more than most_ranges in all."""
    group_rows = rows // groups
    tiles = pl.cdiv(group_rows, tile_rows)
    wanted = tiles if most_ranges is None else min(tiles, max(1, most_ranges // groups))
    tiles_a_range = pl.cdiv(tiles, wanted)
    return RowRanges(group_rows, tiles_a_range * tile_rows, pl.cdiv(tiles, tiles_a_range))


def fits(shape: tuple[int, int], outputs: int) -> bool:
    """Whether the kernels take a matrix of that shape and a product of as many rows with that many outputs."""
    rows, columns = shape
    return outputs <= MOST_OUTPUTS and 0 < rows * max(columns, outputs) <= LARGEST_OPERAND


def power_of_two(size: int) -> int:
    """Returns the smallest side of a tile that holds size."""
    return max(SMALLEST_SIDE, 1 << math.ceil(math.log2(max(size, 1))))


def pick_tile(tiles: Tiles, rows: int, outputs: int, most_outputs: int | None = None) -> Tile:
    """Picks the tile for a number of rows from a table; it covers all outputs, or most_outputs of them.

    Args:
        tiles: (most rows, or None for any; (rows, channels, warps, stages) of a tile with 128 outputs). A tile with
            more outputs has fewer rows and channels, to fit the chip's shared memory.
    """
    side = min(power_of_two(outputs), most_outputs or MOST_OUTPUTS)
    tile_rows, channels, warps, stages = next(sides for most, sides in tiles if most is None or rows <= most)
    tile_rows, channels = (max(SMALLEST_SIDE, size // max(side // 128, 1)) for size in (tile_rows, channels))
    return Tile(tile_rows, channels, side, warps, stages)


def norm_relu(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns relu(scale * x + bias) of float[r, c], computed in float32 or wider, in x's dtype."""
    out = x.astype(wide(x.dtype)) * scale.astype(wide(x.dtype))[None, :] + bias.astype(wide(x.dtype))[None, :]
    return jnp.maximum(out, 0).astype(x.dtype)


def product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Multiplies two matrices over one axis of each, in float32 or wider, without TF32's rounding of float32."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=wide(a.dtype))


def indices(start: Any, size: int, end: Any) -> tuple[Any, jax.Array]:
    """Returns a slice of `size` from start, and a mask of what lies before end."""
    start = lax.convert_element_type(start, jnp.int32)  # a loop's counter is wider where JAX_ENABLE_X64 is set
    return pl.ds(start, size), start + lax.iota(jnp.int32, size) < end


def load_vector(ref: Any, columns: tuple[Any, jax.Array]) -> jax.Array:
    """Loads part of a vector; 0 outside it."""
    return plgpu.load(ref.at[columns[0]], mask=columns[1], other=0)


def load_matrix(ref: Any, rows: tuple[Any, jax.Array], columns: tuple[Any, jax.Array]) -> jax.Array:
    """Loads a tile of a matrix; 0 outside it."""
    mask = rows[1][:, None] & columns[1][None, :]
    return plgpu.load(ref.at[rows[0], columns[0]], mask=mask, other=0)


def store_matrix(ref: Any, rows: tuple[Any, jax.Array], columns: tuple[Any, jax.Array], values: jax.Array) -> None:
    """Stores the part of a tile that lies inside the matrix."""
    mask = rows[1][:, None] & columns[1][None, :]
    plgpu.store(ref.at[rows[0], columns[0]], values.astype(ref.dtype), mask=mask)
