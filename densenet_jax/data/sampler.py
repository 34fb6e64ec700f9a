"""Order of examples and their random numbers, as pure functions of (seed, position).

A position counts the examples that training has used since its start, over all processes.
"""

import functools

import numpy as np
from grain.experimental import index_shuffle

_ORDER, _CROPS = 0x6F72, 0x6372  # purposes of the random streams
_WORDS = 4  # random words per Philox count


class Order:
    """Endless training order: every example once per epoch, each epoch in another order.

    Epochs follow each other without a gap, so the last examples of one that fill no batch begin the next batch.
    Any stretch costs its own length, wherever it begins, and nothing of the size of the data set is kept.

    With repeats r (repeated augmentation, arXiv:1901.09335) each example holds r consecutive positions, so that an
    epoch of `size` positions sees size / r different examples, as in the reference samplers. Those begin a new order
    after `size` positions; here an order is completed: r * size positions see every example exactly r times.
    """

    def __init__(self, size: int, seed: int, repeats: int = 1) -> None:
        """Orders `size` examples; `seed` is a nonnegative integer."""
        self._size, self._repeats = size, repeats
        self._epoch_seed = functools.lru_cache(4)(lambda epoch: _hash(seed, _ORDER, epoch))

    def stretch(self, start: int, count: int) -> list[int]:
        """Returns the examples at positions `start` to `start + count - 1`."""
        last = self._size - 1
        indices = []
        for position in range(start, start + count):
            epoch, place = divmod(position // self._repeats, self._size)
            indices.append(index_shuffle(place, max_index=last, seed=self._epoch_seed(epoch), rounds=4) if last else 0)
        return indices


class Draws:
    """Random numbers per position: Philox, counted from the position, so that any stretch is computed directly."""

    def __init__(self, seed: int, per_example: int) -> None:
        """Gives each position `per_example` numbers, a multiple of 4 or 0."""
        if per_example % _WORDS:
            raise ValueError(f"per_example is {per_example}; expected a multiple of {_WORDS}")
        self._key = np.random.SeedSequence([seed, _CROPS]).generate_state(2, np.uint64)
        self._per_example = per_example

    def stretch(self, start: int, count: int) -> np.ndarray:
        """Returns the numbers of positions `start` to `start + count - 1`: float64 [count, per_example] in [0, 1)."""
        generator = np.random.Philox(key=self._key, counter=start * self._per_example // _WORDS)
        words = np.asarray(generator.random_raw(count * self._per_example), np.uint64)
        return (words >> np.uint64(11)).reshape(count, self._per_example) * 2.0**-53


def _hash(*words: int) -> int:
    """Hashes integers to 32 bits, so that close ones give unrelated values."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])
