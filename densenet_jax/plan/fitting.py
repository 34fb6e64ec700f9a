"""Finds the largest batch that fits with few compilations."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

RESOLUTION = 0.01  # relative to the batch; each halving would cost another compilation


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A batch size that was compiled."""

    units: int  # size, in the smallest steps that a batch can change by
    fits: bool
    memory_bytes: int | None  # memory needed on a chip; None if the compiler does not report it
    # Memory of a chip, counted as for `memory_bytes`: a compiler that fails counts differently from one that succeeds.
    limit_bytes: int

    @property
    def fullness(self) -> float | None:
        """Share of the memory it needs, above 1 if it does not fit."""
        return None if self.memory_bytes is None else self.memory_bytes / self.limit_bytes


class Limit(NamedTuple):
    """Sizes around the limit: `fitting` is the largest seen to fit (0 if none), `failing` the smallest seen not to."""

    fitting: int
    failing: int


def largest_that_fits(attempt: Callable[[int], Attempt], first: Attempt) -> Limit:
    """Narrows the limit down to `RESOLUTION` or one unit, starting from an attempt that did not fit.

    Memory grows almost linearly with the size, so the next size is where the line through the nearest attempts meets
    the limit, rounded down to a multiple of a power of two. In case memory is not linear, each attempt after the third
    keeps four times more distance from earlier sizes, which ends in bisection.
    """
    tried = [first]
    low, high = 0, first.units
    while high - low > max(1, RESOLUTION * high):
        tried.append(attempt(_choose_units(tried, low, high)))
        if tried[-1].fits:
            low = tried[-1].units
        else:
            high = tried[-1].units
    return Limit(low, high)


def _choose_units(tried: list[Attempt], low: int, high: int) -> int:
    """Chooses a size between `low`, which fits, and `high`, which does not."""
    guess, times = _extrapolate_limit(tried), 4 ** max(0, len(tried) - 4)
    lowest, highest = low + times * _step(low) if low else 1, high - times * _step(high)
    middle = math.isqrt(max(low, 1) * high)  # geometric: the range may span orders of magnitude
    units = middle if guess is None or lowest >= highest else min(max(guess, lowest), highest)
    step = _step(units)
    rounded = units // step * step
    return rounded if rounded > low else rounded + step


def _step(units: int) -> int:
    """Returns the largest power of two within the resolution of a size."""
    return 1 << max(0, math.floor(RESOLUTION * units).bit_length() - 1)


def _extrapolate_limit(tried: list[Attempt]) -> int | None:
    """Returns the size that would just fill the memory by the line through the nearest two attempts, or None."""
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
