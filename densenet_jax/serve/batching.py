"""Shares worker threads between requests, one item of each request in turn."""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
FRUITLESS_TURNS = 3  # of the event loop: grpcio takes a few for a request


class FairQueue(Generic[Item, Result]):
    """Hands items in groups to worker threads, and the results of each call to its caller.

    A free worker takes what is there at once; while all are busy, items gather for the next one. So nobody waits for an
    idle worker, and groups grow with the load. A call's items queue in rounds, one in each, so that a call with few
    items doesn't wait for one with many. Belongs to one event loop.
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
        self._queue: list[tuple[int, int, Item, asyncio.Future[Result]]] = []  # a heap by rounds, then by arrivals
        self._arrivals, self._round = itertools.count(), 0
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Returns the results of `items`. Canceling the caller drops the items that still wait.

        Raises:
            Exception: returned by `work` for one of the items, or raised by it.
        """
        futures = [self._put(item, round_) for round_, item in enumerate(items, start=self._round + 1)]
        if len(self._running) < self._workers:
            self._running.add(asyncio.create_task(self._run()))
        try:
            return [await future for future in futures]
        finally:
            while futures:  # left there, they would hold an exception, which holds this frame
                futures.pop().cancel()

    def _put(self, item: Item, round_: int) -> asyncio.Future[Result]:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (round_, next(self._arrivals), item, future))
        return future

    async def _run(self) -> None:
        try:
            if self._wait_secs and len(self._queue) < self._most:
                await asyncio.sleep(self._wait_secs)
            while self._queue:
                await self._gather()
                if group := self._take():
                    await self._work_on(group)
        finally:
            # At once, not when the loop gets to it: items queued meanwhile would wait for a worker that is gone.
            self._running.discard(asyncio.current_task())

    async def _gather(self) -> None:
        """Lets the event loop read what has arrived, as long as that brings items; waits for no clock."""
        known = fruitless = 0
        while fruitless < FRUITLESS_TURNS and len(self._queue) < self._most:
            fruitless = fruitless + 1 if len(self._queue) == known else 0
            known = len(self._queue)
            await asyncio.sleep(0)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        group: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._queue and len(group) < self._most:
            self._round, _, item, future = heapq.heappop(self._queue)
            if not future.done():  # else its caller is gone or already has an error
                group.append((item, future))
        return group

    async def _work_on(self, group: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | Exception]
        try:
            items = [item for item, _ in group]
            results = await asyncio.get_running_loop().run_in_executor(self._threads, self._work, items)
        except Exception as error:
            results = [error] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
