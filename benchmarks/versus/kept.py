"""Keeps workers for several cases: importing a framework takes longer than many a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from versus.turns import Worker


class KeptWorker:
    """A worker that outlives its contestant unless it has failed."""

    def __init__(self, name: str, worker: Worker, kept: dict[str, Worker]) -> None:
        self._name, self._worker, self._kept = name, worker, kept
        self._failed = False

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Returns the worker's answer."""
        answer = self._worker.ask(request, **arguments)
        self._failed = self._failed or "error" in answer
        return answer

    def stop(self) -> None:
        """Ends a worker that has failed, as its memory would disturb the next case."""
        if self._failed and self._kept.pop(self._name, None) is self._worker:
            self._worker.stop()


class KeptWorkers:
    """At most one worker a name; leaving the block ends them all."""

    def __init__(self) -> None:
        self._kept: dict[str, Worker] = {}

    def __enter__(self) -> KeptWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._kept.values():
            worker.stop()

    def start(self, name: str, make: Callable[[], Worker]) -> KeptWorker:
        """Returns the worker of that name, started first if there is none."""
        if name not in self._kept:
            self._kept[name] = make()
        return KeptWorker(name, self._kept[name], self._kept)
