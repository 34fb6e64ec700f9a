"""The largest batch that fits, found by trying."""

from collections.abc import Callable


def largest_that_fits(fits: Callable[[int], bool], too_large: int, guess: int) -> int:
    """The largest number below `too_large` for which `fits` holds, 0 where there is none.

    From `guess` on in strides that double until the limit is passed, then bisection: a good guess needs two probes.

    Args:
        fits: dear to call; true up to some number and false from there on.
        too_large: is known not to fit.
        guess: where the limit is thought to be.
    """
    low, high = 0, too_large
    probe, stride = min(max(guess, 1), too_large - 1), 1
    while high - low > 1:
        if not low < probe < high:
            probe = (low + high) // 2
        if fits(probe):
            low, probe = probe, probe + stride
        else:
            high, probe = probe, probe - stride
        stride *= 2
    return low
