"""Shares worker threads between requests, one item of each request in turn."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

FRUITLESS_TURNS = 3  # of the event loop: grpcio takes a few for a request


class FairQueue:
    """Hands items in groups to worker threads.

    A free worker takes what is there at once; while all are busy, items gather for the next one. So nobody waits for an
    idle worker, and groups grow with the load. Belongs to one event loop.
    """

    def __init__(
        self, work: Callable[[list], Sequence], *, name: str, most: int = 1, workers: int = 1, wait_secs: float = 0.0
    ):
        """Starts the threads.

        Args:
            work: returns a result for each item of a group, or the exception for this item's caller; an exception that
                it raises goes to all callers of the group. Called in a worker thread.
            most: items of a group.
            wait_secs: how long an idle worker waits for a group to fill.
        """
        self._work, self._most, self._workers, self._wait_secs = work, most, workers, wait_secs
        self._threads = ThreadPoolExecutor(workers, name)
        self._queue: asyncio.PriorityQueue[tuple[int, int, Any, asyncio.Future]] = asyncio.PriorityQueue()
        self._round, self._arrivals = 0, itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._taking = asyncio.Lock()

    def put(self, item: Any, turn: int) -> asyncio.Future:
        """Queues an item for the round `turn` from now; returns its result to come."""
        self._tasks = self._tasks or [asyncio.create_task(self._run()) for _ in range(self._workers)]
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((self._round + turn, next(self._arrivals), item, future))
        return future

    async def _run(self) -> None:
        while True:
            if group := await self._take():
                await self._work_on(group)

    async def _take(self) -> list[tuple[Any, asyncio.Future]]:
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

    async def _work_on(self, group: list[tuple[Any, asyncio.Future]]) -> None:
        items, futures = map(list, zip(*group, strict=True))
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._threads, self._work, items)
        except Exception as error:
            results = [error] * len(items)
        for future, result in zip(futures, results, strict=True):
            if isinstance(result, Exception) and not future.done():
                future.set_exception(result)
            elif not future.done():
                future.set_result(result)


async def take_turns(items: Sequence, choose: Callable[[Any], FairQueue]) -> list:
    """Hands each item to the queue that `choose` returns for it; returns the results, in the order of the items.

    The items queue in rounds, one in each, so that a call with few items doesn't wait for one with many. Raises what
    the work of a queue returns or raises for one of them. Canceling the caller drops the items that still wait.
    """
    futures = [choose(item).put(item, turn) for turn, item in enumerate(items, start=1)]
    try:
        return [await future for future in futures]
    finally:
        while futures:  # left there, they would hold an exception, which holds this frame
            futures.pop().cancel()
