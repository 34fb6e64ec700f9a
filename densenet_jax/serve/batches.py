"""How many images a compiled program takes at once: any number is covered by a few sizes."""

from collections.abc import Callable, Sequence

import numpy as np


def cover(count: int, sizes: Sequence[int]) -> list[int]:
    """Compiled sizes that together take `count` images, at most half of each one padding.

    Args:
        count: images, at least 1.
        sizes: what is compiled, rising.

    Returns:
        For (1, 4, 16, 64): 3 -> [4], 6 -> [4, 4], 9 -> [16], 18 -> [16, 4], 100 -> [64, 64].
    """
    batches: list[int] = []
    while count > 0:
        enough = next((size for size in sizes if size >= count), sizes[-1])
        fits = [size for size in sizes if size <= count]
        batches.append(enough if count >= enough / 2 or not fits else fits[-1])
        count -= batches[-1]
    return batches


def in_batches(images: np.ndarray, sizes: Sequence[int], compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`compute` of all images, in as many calls as `cover` says.

    Args:
        images: [n, ...], n at least 1.
        sizes: as for `cover`.
        compute: of a batch, [b, ...] -> [b, k], each row from its own image; pads to the next size by itself.

    Returns:
        [n, k].
    """
    ends = np.cumsum(cover(len(images), sizes)[:-1])
    return np.concatenate([compute(batch) for batch in np.split(images, ends)])
