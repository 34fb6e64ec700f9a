"""Items that queue while a worker is busy are worked on together, in turns between their callers."""

import asyncio
import threading

import pytest

from densenet_jax.serve.batching import FairQueue, take_turns


class Worker:
    """Doubles numbers, in groups that are kept in `groups`, each as soon as it is let."""

    def __init__(self):
        self.groups: list[list[int]] = []
        self.free = threading.Semaphore(0)

    def __call__(self, items):
        self.groups.append(list(items))
        assert self.free.acquire(timeout=30)
        return [ValueError(f"{item} is negative") if item < 0 else 2 * item for item in items]


async def begun(worker, count):
    """Returns when so many groups have been begun."""
    while len(worker.groups) < count:
        await asyncio.sleep(0.001)


def run(case):
    """What `case` returns within half a minute."""

    async def limited():
        async with asyncio.timeout(30):
            return await case

    return asyncio.run(limited())


def ask(queue, items):
    return take_turns(items, lambda _: queue)


def make_queue(worker, **options):
    return FairQueue(worker, name="test", **{"most": 4, **options})


def test_an_idle_worker_begins_at_once(monkeypatch):
    began = threading.Event()

    def work(items):
        began.set()
        return items

    async def waits(secs, sleep=asyncio.sleep):
        assert secs == 0, "it waits although nothing is worked on"
        await sleep(0)

    async def case():
        queue = FairQueue(work, name="test", most=4)
        monkeypatch.setattr(asyncio, "sleep", waits)
        asked = asyncio.create_task(ask(queue, [3]))
        assert await asyncio.to_thread(began.wait, 20)
        return await asked

    assert run(case()) == [3]


def test_an_immediate_second_request_is_answered():
    """The worker that has just run out of work has not gone yet, as the event loop sees it."""

    async def case():
        queue = FairQueue(lambda items: items, name="test", most=4)

        async def caller(number):
            return [(await ask(queue, [10 * number + item]))[0] for item in range(10)]

        alone = await caller(0)
        together = await asyncio.gather(*map(caller, (1, 2, 3)))
        return [alone, *together]

    assert run(case()) == [list(range(10 * number, 10 * number + 10)) for number in range(4)]


def test_requests_queued_behind_a_busy_worker_are_one_group():
    worker = Worker()

    async def case():
        queue = make_queue(worker)
        first = asyncio.create_task(ask(queue, [1]))
        await begun(worker, 1)
        rest = [asyncio.create_task(ask(queue, [item])) for item in (2, 3, 4, 5, 6)]
        await asyncio.sleep(0.01)
        worker.free.release(3)
        return [(await task)[0] for task in (first, *rest)]

    assert run(case()) == [2, 4, 6, 8, 10, 12]
    assert worker.groups == [[1], [2, 3, 4, 5], [6]]


def test_a_bad_item_fails_alone():
    worker = Worker()
    worker.free.release(9)

    async def case():
        queue = make_queue(worker, wait_secs=0.05)
        return await asyncio.gather(*[ask(queue, [item]) for item in (1, -1, 2)], return_exceptions=True)

    first, bad, last = run(case())
    assert (first, last) == ([2], [4])
    assert isinstance(bad, ValueError)
    assert worker.groups == [[1, -1, 2]]


def test_an_error_goes_to_its_group_and_the_next_group_is_answered():
    def work(items):
        if 0 in items:
            raise ZeroDivisionError
        return items

    async def case():
        queue = FairQueue(work, name="test", most=2, wait_secs=0.05)
        return await asyncio.gather(*[ask(queue, [item]) for item in (0, 1, 2)], return_exceptions=True)

    first, second, third = run(case())
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, ZeroDivisionError)
    assert third == [2]


def test_a_client_that_leaves_the_queue_costs_nothing():
    worker = Worker()

    async def case():
        queue = make_queue(worker)
        under_way = asyncio.create_task(ask(queue, [1]))
        await begun(worker, 1)
        waiting = asyncio.create_task(ask(queue, [2]))
        other = asyncio.create_task(ask(queue, [3]))
        await asyncio.sleep(0.01)
        under_way.cancel()
        waiting.cancel()
        worker.free.release(2)
        with pytest.raises(asyncio.CancelledError):
            await under_way
        return await other

    assert run(case()) == [6]
    assert worker.groups == [[1], [3]]


def test_workers_share_the_queue():
    worker = Worker()

    async def case():
        queue = make_queue(worker, workers=2)
        tasks = [asyncio.create_task(ask(queue, [item])) for item in (1, 2)]
        await begun(worker, 1)
        tasks += [asyncio.create_task(ask(queue, [3]))]
        await begun(worker, 2)  # although nothing is done yet
        worker.free.release(2)
        return [(await task)[0] for task in tasks]

    assert run(case()) == [2, 4, 6]
    assert sorted(map(len, worker.groups)) == [1, 2]


def test_callers_take_turns():
    worker = Worker()

    async def case():
        queue = make_queue(worker, most=2)
        large = asyncio.create_task(ask(queue, [1, 2, 3, 4, 5]))
        await begun(worker, 1)
        small = asyncio.create_task(ask(queue, [9]))
        await asyncio.sleep(0.01)
        worker.free.release(9)
        done, _ = await asyncio.wait([large, small], return_when=asyncio.FIRST_COMPLETED)
        return done == {small}, await large, await small

    assert run(case()) == (True, [2, 4, 6, 8, 10], [18])
    assert worker.groups == [[1, 2], [3, 9], [4, 5]]
