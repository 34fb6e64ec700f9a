"""Makes batches for training and evaluation, shared between processes.

Training data is a pure function of (seed, step): neither threads nor processes nor interruptions change it.
"""

import threading
from typing import Any

import numpy as np

from densenet_jax.data.batches import FOREVER, Batches, Damaged, Rows
from densenet_jax.data.records import DamagedImage, Source
from densenet_jax.data.sampler import BalancedOrder, Draws, Order
from densenet_jax.data.transforms import Transform
from densenet_jax.errors import UserError

_KEEP_BYTES = 256 * 2**20  # cache for transformed images that are the same in every epoch


def train_batches(
    source: Source,
    *,
    seed: int,
    global_batch_size: int,
    transform: Transform,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    reader_threads: int = 0,
    prefetch_batches: int = 4,
    on_damaged: str = "error",
    repeats: int = 1,
    sampler: str = "shuffled",
) -> Batches:
    """Makes endless training batches from `start_step` on; starting late costs no more than starting early.

    Step t uses the positions t * global_batch_size and following; each process has an equal, contiguous share. Batches
    are {"image": uint8 or uint16 [b, h, w, c], "label": int32 [b]}, b being this process's share; "label" is float32
    [b, k] if the source has many labels.

    Args:
        seed: determines, with the step, order and crops.
        global_batch_size: examples per step, over all processes.
        process_count: must divide `global_batch_size`.
        reader_threads: threads that read and decode; 0: one per core.
        prefetch_batches: batches that wait in memory at most, besides the ones in use.
        on_damaged: "error" stops with the image's name; "skip" takes the next example of the data set and counts.
        repeats: neighboring examples of a batch that are one image, each with its own random transform; see
            `Order`. Must divide `global_batch_size`.
        sampler: "shuffled" gives every example once an epoch; "balanced" all classes equally often, see
            `BalancedOrder`.

    Raises:
        UserError: the batch can't be shared out. DamagedImage: (while iterating) an image can't be decoded.
    """
    share = _share(global_batch_size, process_count)
    damaged = Damaged(on_damaged == "skip")
    balanced = sampler == "balanced"
    order = BalancedOrder(source.labels(), seed, repeats) if balanced else Order(len(source), seed, repeats)
    draws = Draws(seed, transform.draws)
    read = _Kept(source, transform, damaged) if not transform.draws else _Fresh(source, transform, damaged)

    def fill(rows: Rows) -> None:
        position = rows.step * global_batch_size + process_index * share + rows.first
        indices, numbers = order.stretch(position, len(rows)), draws.stretch(position, len(rows))
        for row in rows:
            read(indices[row], numbers[row], rows.batch["image"][row : row + 1], rows.batch["label"][row : row + 1])

    steps = FOREVER[start_step:]
    arrays = _arrays(share, transform, source)
    return Batches(arrays, steps, fill, damaged, reader_threads=reader_threads, prefetch_batches=prefetch_batches)


def eval_batches(
    source: Source,
    *,
    global_batch_size: int,
    transform: Transform,
    process_index: int = 0,
    process_count: int = 1,
    reader_threads: int = 0,
    prefetch_batches: int = 4,
    on_damaged: str = "error",
) -> Batches:
    """Makes evaluation batches: every example once, in file order, the same number of batches in all processes.

    The last batch is filled up with black images of class 0 whose mask is False. With `on_damaged="skip"` damaged
    images are masked out as well, and counted. Arguments as for `train_batches`.

    Returns:
        iterator of {"image": uint8 or uint16 [b, h, w, c] (or [b, crops, h, w, c]), "label": int32 [b] or float32
        [b, k], "mask": bool [b]}; with `label_sets` also {"label_set": bool [b, classes]}, True for every right class.
    """
    share = _share(global_batch_size, process_count)
    damaged = Damaged(on_damaged == "skip")
    total = len(source)
    numbers = np.full(transform.draws, 0.5)

    def fill(rows: Rows) -> None:
        start = rows.step * global_batch_size + process_index * share + rows.first
        batch = rows.batch
        for row in rows:
            for array in batch.values():
                array[row] = 0
            if start + row >= total:
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

    steps = range(-(-total // global_batch_size))
    arrays = _arrays(share, transform, source) | {"mask": ((share,), np.bool_)}
    if source.label_sets:
        arrays["label_set"] = ((share, source.num_classes), np.bool_)
    return Batches(arrays, steps, fill, damaged, reader_threads=reader_threads, prefetch_batches=prefetch_batches)


class _Fresh:
    """Reads and transforms an example, or the next undamaged one if damaged images may be skipped."""

    def __init__(self, source: Source, transform: Transform, damaged: Damaged) -> None:
        self._source, self._transform, self._damaged = source, transform, damaged

    def __call__(self, index: int, draws: np.ndarray, image: np.ndarray, label: np.ndarray) -> None:
        """Writes the example into `image` uint8[1, h, w, c] and `label`, int32[1] or float32[1, k]."""
        size = len(self._source)
        for offset in range(size):
            try:
                record = self._source[(index + offset) % size]
                image[0], label[0] = self._transform(record.image, draws, record.name), record.label
                return
            except DamagedImage as error:
                self._damaged.add(error)
        raise UserError(f"All {size} images of the training split are damaged.")


class _Kept(_Fresh):
    """Caches examples of a transform without draws in memory, if the data set is small enough."""

    def __init__(self, source: Source, transform: Transform, damaged: Damaged) -> None:
        super().__init__(source, transform, damaged)
        shape = (len(source), *transform.shape)
        fits = int(np.prod(shape, dtype=np.int64)) * transform.dtype.itemsize <= _KEEP_BYTES
        self._images = np.empty(shape if fits else (0,), transform.dtype)
        label_shape, label_dtype = _arrays(len(self._images), transform, source)["label"]
        self._labels = np.empty(label_shape, label_dtype)
        self._have = np.zeros(len(self._images), bool)
        self._lock = threading.Lock()

    def __call__(self, index: int, draws: np.ndarray, image: np.ndarray, label: np.ndarray) -> None:
        """See `_Fresh`."""
        if not len(self._have):
            return super().__call__(index, draws, image, label)
        if not self._have[index]:
            super().__call__(index, draws, image, label)
            with self._lock:  # the image before the flag that it is there
                self._images[index], self._labels[index] = image[0], label[0]
                self._have[index] = True
            return None
        image[0], label[0] = self._images[index], self._labels[index]
        return None


def _arrays(share: int, transform: Transform, source: Source) -> dict[str, tuple[tuple[int, ...], Any]]:
    label = ((share, source.num_classes), np.float32) if source.many_labels else ((share,), np.int32)
    return {"image": ((share, *transform.shape), transform.dtype), "label": label}


def _share(global_batch_size: int, process_count: int) -> int:
    if global_batch_size < 1 or global_batch_size % process_count:
        raise UserError(
            f"The global batch of {global_batch_size} can't be shared by {process_count} processes; "
            f"choose a multiple of {process_count}."
        )
    return global_batch_size // process_count
