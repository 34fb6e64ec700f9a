"""Shares worker threads between requests, one item of each request in turn."""

import asyncio
import collections
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")
FRUITLESS_TURNS = 3  # of the event loop: grpcio takes a few for a request


class _Call(Generic[Item, Result]):
    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.next = self.done = 0
        self.results: list[Any] = [None] * len(items)
        self.future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()


class FairQueue(Generic[Item, Result]):
    """Hands items in groups to worker threads, and the results of each call to its caller.

    A free worker takes what is there at once; while all are busy, items gather for the next one. So nobody waits for an
    idle worker, and groups grow with the load. A group has one item of each call in turn, so that a call with few items
    doesn't wait for one with many. Belongs to one event loop.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        name: str,
        most: int = 1,
        workers: int = 1,
        wait_secs: float = 0.0,
    ):
        """Starts the threads.

        Args:
            work: returns a result for each item of a group, or the exception for this item's caller; an exception that
                it raises goes to all callers of the group. Called in a worker thread.
            name: prefix of the threads' names.
            most: items of a group.
            workers: number of groups worked on at a time.
            wait_secs: how long a free worker waits for a group to fill.
        """
        self._work, self._most, self._workers, self._wait_secs = work, most, workers, wait_secs
        self._threads = ThreadPoolExecutor(workers, name)
        self._calls: collections.deque[_Call[Item, Result]] = collections.deque()
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Returns the results of `items`. Canceling the caller removes the items that still wait.

        Raises:
            Exception: returned by `work` for one of the items, or raised by it.
        """
        call: _Call[Item, Result] = _Call(items)
        self._calls.append(call)
        if len(self._running) < self._workers:
            self._running.add(asyncio.create_task(self._run()))
        try:
            return await call.future
        finally:
            del call  # an exception would hold this frame, which held the exception

    async def _run(self) -> None:
        try:
            if self._wait_secs and self._waiting() < self._most:
                await asyncio.sleep(self._wait_secs)
            while self._calls:
                await self._gather()
                if group := self._take():
                    await self._work_on(group)
        finally:
            # At once, not when the loop gets to it: items queued meanwhile would wait for a worker that is gone.
            self._running.discard(asyncio.current_task())

    async def _gather(self) -> None:
        """Lets the event loop read what has arrived, as long as that brings calls; waits for no clock."""
        known = fruitless = 0
        while fruitless < FRUITLESS_TURNS and len(self._calls) < self._most:
            fruitless = fruitless + 1 if len(self._calls) == known else 0
            known = len(self._calls)
            await asyncio.sleep(0)

    def _waiting(self) -> int:
        return sum(len(call.items) - call.next for call in self._calls)

    def _take(self) -> list[tuple[_Call[Item, Result], int]]:
        group: list[tuple[_Call[Item, Result], int]] = []
        while self._calls and len(group) < self._most:
            call = self._calls.popleft()
            if call.future.done():  # its caller is gone or already has an error
                continue
            group.append((call, call.next))
            call.next += 1
            if call.next < len(call.items):
                self._calls.append(call)
        return group

    async def _work_on(self, group: Sequence[tuple[_Call[Item, Result], int]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            items = [call.items[number] for call, number in group]
            results = await loop.run_in_executor(self._threads, self._work, items)
        except Exception as error:
            results = [error] * len(group)
        for (call, number), result in zip(group, results, strict=True):
            if call.future.done():  # its caller is gone or already has an error
                continue
            if isinstance(result, Exception):
                call.future.set_exception(result)
                continue
            call.results[number] = result
            call.done += 1
            if call.done == len(call.items):
                call.future.set_result(call.results)


def cover(count: int, sizes: Sequence[int]) -> list[int]:
    """Chooses compiled sizes (in rising order) that together take `count` images, at most half of each one padding.

    Sizes (1, 4, 16, 64) give: 3 -> [4], 6 -> [4, 4], 9 -> [16], 18 -> [16, 4], 100 -> [64, 64].
    """
    batches: list[int] = []
    while count > 0:
        enough = next((size for size in sizes if size >= count), sizes[-1])
        fits = [size for size in sizes if size <= count]
        batches.append(enough if count >= enough / 2 or not fits else fits[-1])
        count -= batches[-1]
    return batches


def compute_in_batches(
    images: np.ndarray, sizes: Sequence[int], compute: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Computes [n, ...] -> [n, k] by calls of `compute`, [b, ...] -> [b, k], with the sizes of `cover`."""
    ends = np.cumsum(cover(len(images), sizes)[:-1])
    return np.concatenate([compute(batch) for batch in np.split(images, ends)])
