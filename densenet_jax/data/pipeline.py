"""The order of examples, and batches of them decoded by threads.

Order and crops are pure functions of (seed, position), where a position counts the examples that training has used
since its start. So a run can start at any step without reading what came before, and neither threads nor processes
change what it sees. One Grain element is a part of a batch: large enough that threads need little of the interpreter,
small enough that all threads work on the batch that is needed next.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import grain
import numpy as np

from densenet_jax.data.decode import DamagedImage
from densenet_jax.data.sources import Record, Source
from densenet_jax.data.transforms import DRAWS, Transform
from densenet_jax.errors import UserError

_PART = 32  # examples of an element at most
_ORDER, _CROPS = 0x6F72, 0x6372  # purposes of random numbers
_FOREVER = 2**60
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Order:
    """Which example training uses at a position: every one once an epoch, each epoch in another order.

    The last examples of an epoch that fill no batch begin the first batch of the next.
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        shuffled = grain.MapDataset.range(self.size).shuffle(seed=_hash(self.seed, _ORDER)).repeat()
        object.__setattr__(self, "_shuffled", shuffled)

    def __getitem__(self, position: int) -> int:
        return self._shuffled[position]  # type: ignore[attr-defined]


def crop_draws(seed: int, position: int) -> np.ndarray:
    """float64[DRAWS] in [0, 1): the random numbers that the host spends on the example at `position`."""
    raw = np.random.Philox(key=[_hash(seed, _CROPS), position]).random_raw(DRAWS)
    return (raw >> np.uint64(11)) * 2.0**-53


def _hash(seed: int, purpose: int) -> int:
    """32 bits in which seeds that are close together have nothing in common."""
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])


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
) -> "Batches":
    """Endless training batches from `start_step` on; starting late costs no more than starting early.

    Step t uses the positions t * global_batch_size and following; each process has an equal, contiguous share.

    Args:
        source: the training split.
        seed: with the step, all that order and crops depend on.
        global_batch_size: examples a step, over all processes.
        transform: of `train_transform`.
        process_index: which share is this process's.
        process_count: how many processes there are; must divide `global_batch_size`.
        start_step: step of the first batch.
        reader_threads: threads that read and decode; 0: one a core.
        prefetch_batches: batches that wait in memory at most, besides the ones in use.
        on_damaged: "error" stops with the image's name; "skip" takes the next example of the data set and counts.

    Returns:
        iterator of {"image": uint8[b, h, w, c], "label": int32[b]}.

    Raises:
        UserError: the batch can't be shared out. DamagedImage: (while iterating) an image can't be decoded.
    """
    share = _share(global_batch_size, process_count)
    _check_on_damaged(on_damaged)
    order = Order(len(source), seed)

    def read(step: int, row: int, batch: Batch, damaged: "Damaged") -> None:
        position = step * global_batch_size + process_index * share + row
        index = order[position]
        image, label = _read(source, index, transform, crop_draws(seed, position), damaged)
        batch["image"][row], batch["label"][row] = image, label

    return Batches(
        share,
        transform,
        range(start_step, _FOREVER),
        read,
        masked=False,
        skip=on_damaged == "skip",
        threads=reader_threads,
        prefetch=prefetch_batches,
    )


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
) -> "Batches":
    """Every example once, in the order of the files; all processes get the same number of batches.

    The last batch is filled up with black images of class 0 whose mask is False. With `on_damaged="skip"` damaged
    images are masked out as well, and counted.

    Returns:
        iterator of {"image": uint8[b, h, w, c], "label": int32[b], "mask": bool[b]}.
    """
    share = _share(global_batch_size, process_count)
    _check_on_damaged(on_damaged)
    total = len(source)
    no_draws = np.full(DRAWS, 0.5)

    def read(step: int, row: int, batch: Batch, damaged: "Damaged") -> None:
        index = step * global_batch_size + process_index * share + row
        batch["image"][row], batch["label"][row], batch["mask"][row] = 0, 0, False
        if index >= total:
            return
        record = source[index]
        try:
            batch["image"][row] = transform(record.image, no_draws, record.name)
        except DamagedImage as error:
            damaged.add(record, error)
            return
        batch["label"][row], batch["mask"][row] = record.label, True

    steps = range(-(-total // global_batch_size))
    return Batches(
        share,
        transform,
        steps,
        read,
        masked=True,
        skip=on_damaged == "skip",
        threads=reader_threads,
        prefetch=prefetch_batches,
    )


def _read(
    source: Source, index: int, transform: Transform, draws: np.ndarray, damaged: "Damaged"
) -> tuple[np.ndarray, int]:
    """The transformed example at `index`, or where it is damaged and may be skipped the next one that is whole."""
    for offset in range(len(source)):
        record = source[(index + offset) % len(source)]
        try:
            return transform(record.image, draws, record.name), record.label
        except DamagedImage as error:
            damaged.add(record, error)
    raise UserError("Every image of the training split is damaged.")


def _share(global_batch_size: int, process_count: int) -> int:
    if global_batch_size < 1 or global_batch_size % process_count:
        raise UserError(
            f"The global batch of {global_batch_size} can't be shared by {process_count} processes; "
            f"choose a multiple of {process_count}."
        )
    return global_batch_size // process_count


def _check_on_damaged(on_damaged: str) -> None:
    if on_damaged not in ("error", "skip"):
        raise UserError(f"config.data.on_damaged is {on_damaged!r}; expected error or skip.")


class Damaged:
    """Names of the images that could not be decoded, in the order in which they were met."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self._names: dict[str, None] = {}
        self._lock = threading.Lock()

    def add(self, record: Record, error: DamagedImage) -> None:
        """Notes `record`, or raises `error` where nothing may be skipped."""
        if not self._skip:
            raise error
        with self._lock:
            self._names[record.name] = None

    @property
    def names(self) -> tuple[str, ...]:
        """Each name once."""
        with self._lock:
            return tuple(self._names)


class Batches(Iterator[Batch]):
    """Batches that threads decode ahead. Close it, or use it in a `with`, so that the threads end at once."""

    def __init__(
        self,
        batch_size: int,
        transform: Transform,
        steps: range,
        read: Callable[[int, int, Batch, Damaged], None],
        *,
        masked: bool,
        skip: bool,
        threads: int,
        prefetch: int,
    ) -> None:
        """Prepares to read; nothing is read before the first `next`, or `start`."""
        cv2.setNumThreads(1)  # our own threads use the cores
        self._damaged = Damaged(skip)
        self._parts = -(-batch_size // _PART)
        self._builder = _PartBuilder(batch_size, self._parts, transform, steps, read, self._damaged, masked)
        threads = threads or available_cores()
        ahead = max(1, prefetch) * self._parts
        parts: Any = grain.MapDataset.source(self._builder)
        options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
        self._iterator = iter(parts.to_iter_dataset(options))

    def start(self) -> None:
        """Begins to read ahead without waiting for a batch."""
        self._iterator.start_prefetch()

    def __next__(self) -> Batch:
        for _ in range(self._parts):
            step, batch = next(self._iterator)
        self._builder.forget(step)
        return batch

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of the images that were skipped so far; those of batches that are read ahead are among them."""
        return self._damaged.names

    def close(self) -> None:
        """Ends the threads; the one that is decoding an image finishes that image. May be called twice."""
        self._builder.stop()
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_iterator"):
            self.close()


class _PartBuilder:
    """Random access to parts of batches; parts of one batch share its arrays."""

    def __init__(
        self,
        batch_size: int,
        parts: int,
        transform: Transform,
        steps: range,
        read: Callable[[int, int, Batch, Damaged], None],
        damaged: Damaged,
        masked: bool,
    ) -> None:
        self._shape = (batch_size, transform.image_size_px, transform.image_size_px, transform.channels)
        self._parts, self._steps, self._read, self._damaged, self._masked = parts, steps, read, damaged, masked
        self._open: dict[int, Batch] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def __len__(self) -> int:
        return len(self._steps) * self._parts

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        entry, part = divmod(int(index), self._parts)
        step = self._steps[entry]
        batch = self._batch(step)
        size = self._shape[0]
        for row in range(part * size // self._parts, (part + 1) * size // self._parts):
            if self._stopped:
                break
            self._read(step, row, batch, self._damaged)
        return step, batch

    def _batch(self, step: int) -> Batch:
        with self._lock:
            if step not in self._open:
                self._open[step] = {
                    "image": np.empty(self._shape, np.uint8),
                    "label": np.empty(self._shape[0], np.int32),
                } | ({"mask": np.empty(self._shape[0], bool)} if self._masked else {})
            return self._open[step]

    def forget(self, step: int) -> None:
        """Gives the arrays of a finished batch away."""
        with self._lock:
            del self._open[step]

    def stop(self) -> None:
        """Lets running reads end after the image they are at."""
        self._stopped = True


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
