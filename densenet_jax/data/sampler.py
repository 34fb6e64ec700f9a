"""Order of examples and their random numbers, as pure functions of (seed, position).

A position counts the examples that training has used since its start, over all processes.
"""

import functools

import numpy as np

_ORDER, _CROPS, _GROUPS = 0x6F72, 0x6372, 0x6772  # purposes of the random streams
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
        from grain.experimental import index_shuffle  # not at the top: checks of a run don't need it

        last = self._size - 1
        indices = []
        for position in range(start, start + count):
            epoch, place = divmod(position // self._repeats, self._size)
            indices.append(index_shuffle(place, max_index=last, seed=self._epoch_seed(epoch), rounds=4) if last else 0)
        return indices


class ListedOrder:
    """`Order` of few examples, which keeps whole epochs.

    Grain's shuffle takes about 65,536 / size steps for a place: milliseconds where there are ten.
    """

    LONGEST = 1 << 16

    def __init__(self, size: int, seed: int) -> None:
        """Orders `size` examples; `seed` is a nonnegative integer."""
        self._size = size

        def shuffle(epoch: int) -> np.ndarray:
            key = np.random.SeedSequence([seed, _ORDER, epoch]).generate_state(2, np.uint64)
            return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")

        self._epoch = functools.lru_cache(2)(shuffle)

    def stretch(self, start: int, count: int) -> list[int]:
        """Returns the examples at positions `start` to `start + count - 1`."""
        places = (divmod(position, self._size) for position in range(start, start + count))
        return [int(self._epoch(epoch)[place]) for epoch, place in places]


class BalancedOrder:
    """Endless training order in which every class, or every label's positives, comes equally often.

    The positions form rounds with one example of each group, in an order of their own; round r takes the r-th example
    of each group's endless `Order`. So a group's examples come equally often too, and any stretch is computed directly.
    """

    def __init__(self, labels: np.ndarray, seed: int, repeats: int = 1) -> None:
        """Groups examples by their labels; groups without an example are left out.

        Args:
            labels: int [n] class numbers; or float [n, k] with 1 for a label that is present, whose examples are a
                group, as are the examples without any present label.
        """
        if labels.ndim == 1:
            groups = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        else:
            groups = [np.flatnonzero(present) for present in (labels == 1).T]
            groups.append(np.flatnonzero(~(labels == 1).any(axis=1)))
        self._groups = [group for group in groups if len(group)]
        self._orders = [_order(len(group), _hash(seed, _GROUPS, i)) for i, group in enumerate(self._groups)]
        self._rounds, self._repeats = _order(len(self._groups), _hash(seed, _GROUPS)), repeats

    def stretch(self, start: int, count: int) -> list[int]:
        """Returns the examples at positions `start` to `start + count - 1`."""
        first = start // self._repeats
        last = (start + count - 1) // self._repeats
        chosen = self._rounds.stretch(first, last + 1 - first)
        examples = []
        for place, number in enumerate(chosen, first):
            (draw,) = self._orders[number].stretch(place // len(self._groups), 1)
            examples.append(int(self._groups[number][draw]))
        return [examples[position // self._repeats - first] for position in range(start, start + count)]


def spread(total: int, most: int) -> list[int]:
    """Returns up to `most` of `total` positions, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(most, total)).astype(int)).tolist()


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


def _order(size: int, seed: int) -> Order | ListedOrder:
    return ListedOrder(size, seed) if size <= ListedOrder.LONGEST else Order(size, seed)


def _hash(*words: int) -> int:
    """Hashes integers to 32 bits, so that close ones give unrelated values."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])
