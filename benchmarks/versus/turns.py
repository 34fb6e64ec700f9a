"""Runs workers in processes of their own that take turns, so that each meets the same machine.

A worker reads one JSON object a line and answers with one. Requests: {"ask": "prepare", ...} readies one case and
reports how long that took, {"ask": "turn", "secs": s, "steps_a_wait": n} works for about that long and waits for the
device after every n steps, {"ask": "peak"} reports the memory it needed. An answer may be {"error": "..."}.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

HERE = pathlib.Path(__file__).parent
OUT_OF_MEMORY = "out of memory"
PAUSE_SECS = 0.2  # threads of the last worker's pool may still be spinning


class Worker:
    """One implementation in a process of its own."""

    def __init__(self, script: str, interpreter: str, **environment: str) -> None:
        search = os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))
        shared = {"PYTHONPATH": search, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [interpreter, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | shared | environment,
            text=True,
        )

    def ask(self, request: str, limit_secs: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Returns the worker's answer; {"error": ...} if it died, or was killed after limit_secs."""
        try:
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.write(json.dumps({"ask": request, **arguments}) + "\n")
            self._process.stdin.flush()
            # Every answer was read to its end, so nothing waits in a buffer that select does not see.
            if not select.select([self._process.stdout], [], [], limit_secs)[0]:
                self._process.kill()
                return {"error": f"no answer within {limit_secs:g} s"}
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        status = self._process.wait()
        return {"error": OUT_OF_MEMORY if status == -9 else f"the worker ended with status {status}"}

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


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


@dataclass
class Contestant:
    """An implementation in one comparison, and its results.

    Attributes:
        start: starts its worker.
        case: the request that prepares it.
        prepared: its answer to that.
        secs: of single steps, a list a turn.
        processor_secs: of all threads, a number a turn.
        error: why there are no figures.
        limit_secs: the longest that its worker may take for one answer; None: any time.
        interleaved: whether it took turns with the others; on a small device it may only fit alone.
        steps_a_wait: steps that are issued before the device is waited for: a training loop waits seldom.
    """

    name: str
    start: Callable[[], Worker]
    case: dict[str, Any]
    prepared: dict[str, Any] = field(default_factory=dict)
    secs: list[list[float]] = field(default_factory=list)
    processor_secs: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None
    limit_secs: float | None = None
    interleaved: bool = True
    steps_a_wait: int = 1
    _worker: Worker | None = None

    def prepare(self) -> bool:
        """Starts the worker and readies its case."""
        self.error = None
        self._worker = self.start()
        return self._take(self._worker.ask("prepare", limit_secs=self.limit_secs, **self.case), self.prepared)

    def turn(self, secs: float) -> bool:
        """Takes one turn of about secs seconds."""
        assert self._worker
        answer: dict[str, Any] = {}
        turn = {"secs": secs, "steps_a_wait": self.steps_a_wait}
        if not self._take(self._worker.ask("turn", limit_secs=self.limit_secs, **turn), answer):
            return False
        self.secs.append(answer["secs"])
        self.processor_secs.append(answer["processor_secs"])
        return True

    def finish(self) -> None:
        """Asks for the memory used and ends the worker."""
        if self._worker and not self.error:
            self.peak_bytes = self._worker.ask("peak").get("peak_bytes")
        self.stop()

    def stop(self) -> None:
        """Ends the worker."""
        if self._worker:
            self._worker.stop()
            self._worker = None

    def _take(self, answer: dict[str, Any], into: dict[str, Any]) -> bool:
        self.error = answer.pop("error", None)
        if self.error:
            self.stop()
        into.update(answer)
        return not self.error


def compete(
    contestants: list[Contestant],
    turns: int,
    turn_secs: float,
    budget_secs: float = float("inf"),
    together: bool = False,
) -> None:
    """Lets the contestants take turns; one that does not fit beside the others is measured alone afterwards.

    No round of turns begins later than budget_secs after the first, which is always taken. They are prepared one after
    the other, or together, which is faster on many cores but mixes their compile times.
    """
    try:
        say(f"preparing {', '.join(one.name for one in contestants)}")
        with ThreadPoolExecutor(len(contestants) if together else 1) as pool:
            list(pool.map(Contestant.prepare, contestants))
        _take_turns([one for one in contestants if not one.error], turns, turn_secs, budget_secs)
        for contestant in contestants:
            contestant.finish()
        for contestant in contestants:
            if contestant.error == OUT_OF_MEMORY and len(contestants) > 1:
                contestant.interleaved, contestant.secs, contestant.processor_secs = False, [], []
                if contestant.prepare():
                    _take_turns([contestant], turns, turn_secs, budget_secs)
                contestant.finish()
    finally:
        for contestant in contestants:
            contestant.stop()


def _take_turns(contestants: list[Contestant], turns: int, turn_secs: float, budget_secs: float) -> None:
    began = time.perf_counter()
    for number in range(turns):
        if number and time.perf_counter() - began > budget_secs:
            return
        # Each order once, so that it isn't always the same contestant that follows a heavy one.
        for contestant in contestants if number % 2 == 0 else contestants[::-1]:
            if not contestant.error:
                time.sleep(PAUSE_SECS)
                contestant.turn(turn_secs)


def say(text: str) -> None:
    """Prints a line of progress."""
    print(text, file=sys.stderr, flush=True)
