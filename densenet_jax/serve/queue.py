"""What has queued is worked on together as soon as there is somebody to work on it."""

import asyncio
import collections
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkQueue(Generic[Item, Result]):
    """Hands items in groups to worker threads, and each item's result to whoever waits for it.

    A free worker takes at once what is there; while all are busy, items gather for the next one. So nobody waits
    where there is nothing to do, and groups grow with the load. Belongs to one event loop.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        name: str,
        most: int,
        size: Callable[[Item], int] = lambda item: 1,
        workers: int = 1,
        wait_secs: float = 0.0,
    ):
        """Starts no thread yet.

        Args:
            work: of a group, a result for each item, or the exception that this item's caller gets; what it raises
                all of the group's callers get. Called in a worker thread.
            name: of the threads.
            most: the largest group by `size`; an item that is larger forms a group of its own.
            size: of an item.
            workers: how many groups are worked on at a time.
            wait_secs: how long a free worker waits for a group to fill.
        """
        self._work, self._most, self._size = work, most, size
        self._workers, self._wait_secs = workers, wait_secs
        self._threads = ThreadPoolExecutor(workers, name)
        self._waiting: collections.deque[tuple[Item, asyncio.Future[Result]]] = collections.deque()
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, item: Item) -> Result:
        """The item's result. Who is cancelled while the item waits takes it out of the queue.

        Raises:
            Exception: what `work` gave for this item, or raised.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._running) < self._workers:
            self._running.add(asyncio.create_task(self._run()))
        return await future

    async def _run(self) -> None:
        try:
            if self._wait_secs and sum(self._size(item) for item, _ in self._waiting) < self._most:
                await asyncio.sleep(self._wait_secs)
            while group := self._take():
                await self._work_on(group)
        finally:
            # At once, and not when the loop comes to it: what is queued meanwhile would wait for a worker that is gone.
            self._running.discard(asyncio.current_task())

    async def _work_on(self, group: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._threads, self._work, [item for item, _ in group])
        except Exception as error:
            results = [error] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if future.done():  # its caller is gone
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        group: list[tuple[Item, asyncio.Future[Result]]] = []
        size = 0
        while self._waiting:
            item, future = self._waiting[0]
            if not future.done():
                size += self._size(item)
                if group and size > self._most:
                    break
                group.append((item, future))
            self._waiting.popleft()
        return group
