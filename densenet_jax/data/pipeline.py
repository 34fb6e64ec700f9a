"""Makes batches for training and evaluation, shared between processes.

Training data is a pure function of (seed, step): neither threads nor processes nor interruptions change it.
"""

import dataclasses
from typing import Any

import numpy as np

from densenet_jax.data.batches import FOREVER, Arrays, Batches, Damaged, Fill, Rows
from densenet_jax.data.records import DamagedImage, Source
from densenet_jax.data.sampler import BalancedOrder, Draws, Order
from densenet_jax.data.transforms import Transform
from densenet_jax.errors import UserError

_KEEP_BYTES = 256 * 2**20  # cache for transformed images that are the same in every epoch


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are read, and which part of each is this process's."""

    global_batch_size: int  # examples per step, over all processes; a multiple of `process_count`
    process_index: int = 0
    process_count: int = 1
    reader_threads: int = 0  # threads that read and decode; 0: one per core
    prefetch_batches: int = 4  # batches that wait in memory at most, besides the ones in use
    # "error" stops with the image's name; "skip" takes the next example of the data set in training, masks the image
    # out in evaluation, and counts.
    on_damaged: str = "error"

    def __post_init__(self) -> None:
        """Checks that the batch can be shared out."""
        if self.global_batch_size < 1 or self.global_batch_size % self.process_count:
            raise UserError(
                f"The global batch of {self.global_batch_size} can't be shared by {self.process_count} processes; "
                f"choose a multiple of {self.process_count}."
            )

    @property
    def share(self) -> int:
        """Examples of a batch that are this process's."""
        return self.global_batch_size // self.process_count

    def position(self, rows: Rows) -> int:
        """Returns the position of the first of the rows among the examples of all steps and processes."""
        return rows.step * self.global_batch_size + self.process_index * self.share + rows.first


def train_batches(
    source: Source,
    *,
    seed: int,
    transform: Transform,
    start_step: int = 0,
    repeats: int = 1,
    sampler: str = "shuffled",
    **options: Any,
) -> Batches:
    """Makes endless training batches from `start_step` on; starting late costs no more than starting early.

    Step t uses the positions t * global_batch_size and following; each process has an equal, contiguous share. Batches
    are {"image": uint8 or uint16 [b, h, w, c], "label": int32 [b]}, b being this process's share; "label" is float32
    [b, k] if the source has many labels.

    Args:
        seed: determines, with the step, order and crops.
        repeats: neighboring examples of a batch that are one image, each with its own random transform; see
            `Order`. Must divide the global batch.
        sampler: "shuffled" gives every example once an epoch; "balanced" all classes equally often, see
            `BalancedOrder`.
        options: the fields of `Reading`.

    Raises:
        UserError: the batch can't be shared out. DamagedImage: (while iterating) an image can't be decoded.
    """
    reading = Reading(**options)
    damaged = Damaged(reading.on_damaged == "skip")
    balanced = sampler == "balanced"
    order = BalancedOrder(source.labels(), seed, repeats) if balanced else Order(len(source), seed, repeats)
    draws = Draws(seed, transform.draws)
    read = _Reader(source, transform, damaged)

    def fill(rows: Rows) -> None:
        position = reading.position(rows)
        indices, numbers = order.stretch(position, len(rows)), draws.stretch(position, len(rows))
        for row in rows:
            rows.batch["image"][row], rows.batch["label"][row] = read(indices[row], numbers[row])

    return _batches(reading, _arrays(reading, transform, source), FOREVER[start_step:], fill, damaged)


def eval_batches(source: Source, *, transform: Transform, **options: Any) -> Batches:
    """Makes evaluation batches: every example once, in file order, the same number of batches in all processes.

    The last batch is filled up with black images of class 0 whose mask is False. `options` are the fields of `Reading`.

    Returns:
        iterator of {"image": uint8 or uint16 [b, h, w, c] (or [b, crops, h, w, c]), "label": int32 [b] or float32
        [b, k], "mask": bool [b]}; with `label_sets` also {"label_set": bool [b, classes]}, True for every right class.
    """
    reading = Reading(**options)
    damaged = Damaged(reading.on_damaged == "skip")
    numbers = np.full(transform.draws, 0.5)

    def fill(rows: Rows) -> None:
        start, batch = reading.position(rows), rows.batch
        for row in rows:
            for array in batch.values():
                array[row] = 0
            if start + row >= len(source):
                continue
            try:
                record = source[start + row]
                batch["image"][row] = transform(record.image, numbers, record.name)
            except DamagedImage as error:
                damaged.add(error)
                continue
            batch["label"][row], batch["mask"][row] = record.label, True
            if source.label_sets:
                batch["label_set"][row, list(record.label_set)] = True

    arrays = _arrays(reading, transform, source) | {"mask": ((reading.share,), np.bool_)}
    if source.label_sets:
        arrays["label_set"] = ((reading.share, source.num_classes), np.bool_)
    return _batches(reading, arrays, range(-(-len(source) // reading.global_batch_size)), fill, damaged)


class _Reader:
    """Reads and transforms an example, or the next undamaged one if damaged images may be skipped.

    Keeps the examples of a transform without draws in memory if the data set is small enough.
    """

    def __init__(self, source: Source, transform: Transform, damaged: Damaged) -> None:
        self._source, self._transform, self._damaged = source, transform, damaged
        size = len(source) * int(np.prod(transform.shape)) * transform.dtype.itemsize
        keeps = not transform.draws and size <= _KEEP_BYTES
        self._kept: list[tuple[np.ndarray, int | np.ndarray] | None] = [None] * len(source) if keeps else []

    def __call__(self, index: int, draws: np.ndarray) -> tuple[np.ndarray, int | np.ndarray]:
        """Returns image and label."""
        if self._kept and (kept := self._kept[index]) is not None:
            return kept
        size = len(self._source)
        for offset in range(size):
            try:
                record = self._source[(index + offset) % size]
                example = self._transform(record.image, draws, record.name), record.label
            except DamagedImage as error:
                self._damaged.add(error)
                continue
            if self._kept:
                self._kept[index] = example
            return example
        raise UserError(f"All {size} images of the training split are damaged.")


def _arrays(reading: Reading, transform: Transform, source: Source) -> Arrays:
    share = reading.share
    label = ((share, source.num_classes), np.float32) if source.many_labels else ((share,), np.int32)
    return {"image": ((share, *transform.shape), transform.dtype), "label": label}


def _batches(reading: Reading, arrays: Arrays, steps: range, fill: Fill, damaged: Damaged) -> Batches:
    threads, ahead = reading.reader_threads, reading.prefetch_batches
    return Batches(arrays, steps, fill, damaged, reader_threads=threads, prefetch_batches=ahead)
