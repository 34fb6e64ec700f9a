"""Decodes batches ahead in threads, over Grain.

A Grain element is part of a batch: large enough to spend little time in the interpreter, small enough that all threads
work on the batch needed next and that memory does not grow with their number.
"""

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import cv2
import numpy as np

from densenet_jax.data.records import DamagedImage

PART = 32  # examples per element at most
FOREVER = range(2**40)
Arrays = dict[str, tuple[tuple[int, ...], Any]]  # shape, batch first, and dtype of every array of a batch
Batch = dict[str, np.ndarray]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Damaged:
    """Collects the names of images that can't be decoded, each once, in order."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self._names: dict[str, None] = {}
        self._lock = threading.Lock()

    def add(self, error: DamagedImage) -> None:
        """Records the image of `error`, or raises it if images may not be skipped."""
        if not self._skip:
            raise DamagedImage(error.name, f"{error.why} (mend it, or set config.data.on_damaged=skip)") from error
        with self._lock:
            self._names[error.name] = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names recorded so far."""
        with self._lock:
            return tuple(self._names)


class Stopped(Exception):  # noqa: N818  (no error: ends a read that nobody waits for)
    """Raised in a reading thread after `Batches.close`."""


class Rows:
    """Consecutive rows of one batch, filled by one thread."""

    def __init__(self, step: int, rows: range, batch: Batch, stopped: threading.Event) -> None:
        self.step, self.first, self._count = step, rows.start, len(rows)
        self._stopped = stopped
        self.batch = {key: array[rows.start : rows.stop] for key, array in batch.items()}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Yields 0 to len - 1; raises `Stopped` once the batches are closed."""
        for row in range(self._count):
            if self._stopped.is_set():
                raise Stopped
            yield row


Fill = Callable[[Rows], None]


class Batches(Iterator[Batch], contextlib.AbstractContextManager["Batches"]):
    """An iterator of batches. Close it, or use it in a `with`, to end its threads."""

    def __init__(
        self, arrays: Arrays, steps: range, fill: Fill, damaged: Damaged, *, reader_threads: int, prefetch_batches: int
    ) -> None:
        """Prepares to read; nothing is read before `start` or the first `next`.

        Args:
            arrays: shape (batch first) and dtype of every array of a batch.
            fill: fills some rows of a batch; called from many threads, may raise and record images in `damaged`.
            reader_threads: 0: one per core.
            prefetch_batches: batches that wait in memory at most, besides those in use.
        """
        import grain  # not at the top: it loads Orbax, and checks of a run need neither

        cv2.setNumThreads(1)  # the reader threads already use all cores
        self._damaged = damaged
        self._builder = _PartBuilder(arrays, steps, fill)
        self._parts = self._builder.parts
        ahead = max(1, prefetch_batches) * self._parts
        threads = min(reader_threads or available_cores(), ahead)
        parts: Any = grain.MapDataset.source(self._builder)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._iterator = iter(parts.to_iter_dataset(options))

    def start(self) -> None:
        """Starts reading ahead without waiting for a batch."""
        self._iterator.start_prefetch()

    def __next__(self) -> Batch:
        for _ in range(self._parts):
            step, batch = next(self._iterator)
        self._builder.forget(step)
        return batch

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of the images skipped so far, including those in batches that are read ahead."""
        return self._damaged.names

    def close(self) -> None:
        """Ends the threads, each after its current image. May be called twice."""
        self._builder.stopped.set()
        self._iterator.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_iterator"):
            self.close()


class _PartBuilder:
    """Random access to parts of batches; the parts of one batch share its arrays."""

    def __init__(self, arrays: Arrays, steps: range, fill: Fill) -> None:
        self._arrays, self._steps, self._fill = arrays, steps, fill
        self._size = next(iter(arrays.values()))[0][0]
        self.parts = -(-self._size // PART)
        self._open: dict[int, Batch] = {}
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def __len__(self) -> int:
        return len(self._steps) * self.parts

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        entry, part = divmod(int(index), self.parts)
        step = self._steps[entry]
        with self._lock:
            if step not in self._open:
                self._open[step] = {key: np.empty(*array) for key, array in self._arrays.items()}
            batch = self._open[step]
        rows = range(part * self._size // self.parts, (part + 1) * self._size // self.parts)
        self._fill(Rows(step, rows, batch, self.stopped))
        return step, batch

    def forget(self, step: int) -> None:
        """Releases the arrays of a finished batch."""
        with self._lock:
            del self._open[step]


def available_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yields `function(item)` in order, computed by the pool for up to `ahead` items in advance."""
    items = iter(items)
    waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in itertools.islice(items, ahead))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()
