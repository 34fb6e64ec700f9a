"""Shares worker threads between requests, one item of each request in turn."""

import asyncio
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
        """Starts the threads, called after `name`.

        Args:
            work: returns a result for each item of a group, or the exception for this item's caller; an exception that
                it raises goes to all callers of the group. Called in a worker thread.
            most: items of a group.
            workers: number of groups worked on at a time.
            wait_secs: how long an idle worker waits for a group to fill.
        """
        self._work, self._most, self._workers, self._wait_secs = work, most, workers, wait_secs
        self._threads = ThreadPoolExecutor(workers, name)
        self._queue: asyncio.PriorityQueue[tuple[int, int, Item, asyncio.Future[Result]]] = asyncio.PriorityQueue()
        self._round, self._arrivals = 0, itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._taking = asyncio.Lock()

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Returns the results of `items`. Canceling the caller drops the items that still wait.

        Raises:
            Exception: returned by `work` for one of the items, or raised by it.
        """
        self._tasks = self._tasks or [asyncio.create_task(self._run()) for _ in range(self._workers)]
        futures = [self._put(item, round_) for round_, item in enumerate(items, start=self._round + 1)]
        try:
            return [await future for future in futures]
        finally:
            while futures:  # left there, they would hold an exception, which holds this frame
                futures.pop().cancel()

    def _put(self, item: Item, round_: int) -> asyncio.Future[Result]:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((round_, next(self._arrivals), item, future))
        return future

    async def _run(self) -> None:
        while True:
            await self._work_on(await self._take())

    async def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """Waits for an item, and lets the event loop read what has arrived as long as that brings more."""
        async with self._taking:
            is_idle = self._queue.empty()
            group = [await self._queue.get()]
            if is_idle and self._wait_secs and self._queue.qsize() + 1 < self._most:
                await asyncio.sleep(self._wait_secs)
            known, fruitless = -1, 0
            while fruitless < FRUITLESS_TURNS and self._queue.qsize() + 1 < self._most:
                fruitless = fruitless + 1 if self._queue.qsize() == known else 0
                known = self._queue.qsize()
                await asyncio.sleep(0)
            while len(group) < self._most and not self._queue.empty():
                group.append(self._queue.get_nowait())
            self._round = group[-1][0]
            return [(item, future) for _, _, item, future in group if not future.done()]  # else its caller is gone

    async def _work_on(self, group: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | Exception] = []
        try:
            if items := [item for item, _ in group]:
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
