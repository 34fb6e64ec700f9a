"""The largest batch that fits, to a stated resolution, found with few compilations."""

import dataclasses
import math
from collections.abc import Callable

RESOLUTION = 0.01  # of the batch; a finer answer costs a compilation for each halving and serves nobody


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One size that was compiled for.

    Attributes:
        units: the size, in the smallest steps that a batch can be changed by.
        fits: what came of it.
        memory_bytes: of a chip, needed or used; None where the compiler does not tell.
        limit_bytes: of a chip, by the account that `memory_bytes` is from: a compiler that gives up counts otherwise
            than one that is done.
    """

    units: int
    fits: bool
    memory_bytes: int | None
    limit_bytes: int

    @property
    def fullness(self) -> float | None:
        """The part of the memory that it takes, more than 1 where it does not fit."""
        return None if self.memory_bytes is None else self.memory_bytes / self.limit_bytes


@dataclasses.dataclass(frozen=True)
class Found:
    """Between which sizes the limit lies: `fitting` was seen to fit (0: none was), `failing` was seen not to."""

    fitting: int
    failing: int


def largest_that_fits(attempt: Callable[[int], Attempt], first: Attempt) -> Found:
    """Narrows the limit down until what fits and what doesn't are at most `RESOLUTION`, or one unit, apart.

    Memory is nearly a straight line over the size, so a size is tried where the line through what was seen last meets
    the limit, rounded down to a multiple of a power of two. Memory that is no such line ends it late, not never: after
    the third every attempt keeps four times the distance from what was tried, until only the middle is left.

    Args:
        attempt: dear to call; compiles for a number of units.
        first: did not fit.
    """
    tried = [first]
    low, high = 0, first.units
    while high - low > max(1, RESOLUTION * high):
        tried.append(attempt(_next_units(tried, low, high)))
        if tried[-1].fits:
            low = tried[-1].units
        else:
            high = tried[-1].units
    return Found(low, high)


def _next_units(tried: list[Attempt], low: int, high: int) -> int:
    """A size between `low`, which fits, and `high`, which does not."""
    guess, times = _meets_limit(tried), 4 ** max(0, len(tried) - 4)
    lowest, highest = low + times * _step(low) if low else 1, high - times * _step(high)
    middle = math.isqrt(max(low, 1) * high)  # of what may be orders of magnitude
    units = middle if guess is None or lowest >= highest else min(max(guess, lowest), highest)
    step = _step(units)
    rounded = units // step * step
    return rounded if rounded > low else rounded + step


def _step(units: int) -> int:
    """The largest power of two within the resolution of a size."""
    return 1 << max(0, math.floor(RESOLUTION * units).bit_length() - 1)


def _meets_limit(tried: list[Attempt]) -> int | None:
    """Where memory would be just full by the line through the nearest two sizes; None where that can't be said."""
    fitting, failing = (
        [(one.units, one.fullness) for one in tried if one.fits is fits and one.fullness] for fits in (True, False)
    )
    nearest = fitting[-1:] + failing[-1:]
    if len(nearest) == 1:
        nearest = [(0, 0.0), *fitting, *failing][-2:]
    if not nearest:
        return None
    (units, fullness), (other_units, other_fullness) = nearest
    slope = (other_fullness - fullness) / (other_units - units)
    return math.floor(units + (1 - fullness) / slope) if slope > 0 else None
