"""Layout and sizes for the TPU kernels: arrays with examples last, in parts that fit on the chip.

XLA lays out the large feature maps of a DenseNet with examples in a vector's lanes and channels in its sublanes, so
that a position is a matrix [channels, examples], shifts in space are whole matrices and the first channels are whole
tiles. The kernels take arrays in this layout: a transposition here costs nothing in the compiled program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from densenet_jax.dtypes import wide

LANES = 128  # examples that a program computes at a time
SUBLANES = 16  # channels of a tile in a 16-bit type
VMEM_BYTES = 48 << 20  # requested by a program; chips from v5e on have 64 or 128 MiB, v4 has 16
ON_CHIP_BYTES = 44 << 20  # of VMEM_BYTES, for operands, results and sums

# Sums stay on the chip from one program to the next, which therefore run one after another.
PARAMS = pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)

_EXAMPLES_LAST, _EXAMPLES_FIRST = (1, 2, 3, 0), (3, 0, 1, 2)


def examples_last(x: Float[Array, "b h w c"]) -> Float[Array, "h w c b"]:
    """Transposes to the layout in memory."""
    return lax.transpose(x, _EXAMPLES_LAST)


def examples_first(x: Float[Array, "h w c b"]) -> Float[Array, "b h w c"]:
    """Transposes to the layout of networks."""
    return lax.transpose(x, _EXAMPLES_FIRST)


def put_examples_last(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Makes the compiler lay out x with examples last, so that it isn't copied for the kernels."""
    return with_layout_constraint(x, Layout(major_to_minor=_EXAMPLES_LAST))


def column(values: Float[Array, " c"], dtype: Any) -> Float[Array, "c 1"]:
    """Returns a number for each channel, to combine with a position's examples."""
    return values.astype(dtype)[:, None]


def whole(*sides: int) -> pl.BlockSpec:
    """Specifies an operand that every program reads whole, or a sum over programs."""
    return pl.BlockSpec(sides, lambda *_: (0,) * len(sides))


def part_of(number: int, most: int | None, on_chip_bytes: Callable[[int], int]) -> int:
    """Returns the largest divisor of number that is at most `most` or, without it, fits on the chip; at least 1."""

    def fits(part: int) -> bool:
        return part <= most if most else on_chip_bytes(part) <= ON_CHIP_BYTES

    return max(part for part in range(1, number + 1) if part == 1 or (number % part == 0 and fits(part)))


def clear_at_start(*sums: Any) -> None:
    """Sets sums over all programs to 0 in the first one."""

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _() -> None:
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)


def dot(a: Array, b: Array, contracting: tuple[int, int]) -> Array:
    """Multiplies two matrices over one side of each, in float32 or wider."""
    sides = (((contracting[0],), (contracting[1],)), ((), ()))
    return lax.dot_general(a, b, sides, preferred_element_type=wide(a.dtype))
