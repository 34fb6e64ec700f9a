"""Answers the requests of `turns` in the worker's process until its input ends, for any framework."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Case(Protocol):
    """One case that is ready to be measured."""

    def step(self) -> None:
        """Issues one step."""

    def wait(self) -> None:
        """Returns when all issued steps are done; raises FloatingPointError where the result is not finite."""

    def sample(self) -> list[float]:
        """Returns some of the last result, for comparing programs of the same function; [] where there is none."""

    def forget_peak(self) -> None:
        """Lets the device's peak memory begin anew, where that can be had."""

    def peak_bytes(self) -> int | None:
        """Returns the device's peak memory; None if this process's own counts."""


Prepare = Callable[..., tuple[Case, dict[str, Any]]]


def serve(prepare: Prepare, out_of_memory: Callable[[Exception], bool]) -> None:
    """Answers requests; prepare(**case) gives a Case and the fields to report."""
    # Libraries print to standard output, which must hold the answers alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    case: Case | None = None
    for line in sys.stdin:
        request = json.loads(line)
        ask = request.pop("ask")
        try:
            if ask == "prepare":
                case, answer = _prepare(prepare, request)
            else:
                assert case is not None, "prepare first"
                answer = _turn(case, **request) if ask == "turn" else {"peak_bytes": _peak_bytes(case)}
        except Exception as error:
            message = "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {error}"[:300]
            answer = {"error": message}
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:  # whoever asked was stopped; leaving otherwise would write what is left once more
            os._exit(0)


def _prepare(prepare: Prepare, request: dict[str, Any]) -> tuple[Case, dict[str, Any]]:
    case, info = prepare(**request)
    began = time.perf_counter()
    case.step()
    case.wait()
    first = time.perf_counter()
    case.step()
    case.wait()
    step_secs = time.perf_counter() - first
    _forget_peak(case)
    # The first step's excess over an ordinary one: tracing, compiling, choosing algorithms.
    return case, {"compile_secs": max(first - began - step_secs, 0.0), "sample": case.sample(), **info}


def _turn(case: Case, secs: float, steps_a_wait: int) -> dict[str, Any]:
    step_secs: list[float] = []
    end, used = time.perf_counter() + secs, time.process_time()
    while not step_secs or time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(steps_a_wait):
            case.step()
        case.wait()
        step_secs += [(time.perf_counter() - began) / steps_a_wait] * steps_a_wait
    return {"secs": step_secs, "processor_secs": time.process_time() - used}


def _forget_peak(case: Case) -> None:
    """Resets peak memory, which would include that of compiling."""
    case.forget_peak()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _peak_bytes(case: Case) -> int | None:
    device = case.peak_bytes()
    if device is not None:
        return device
    try:
        with open("/proc/self/status") as file:
            match = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
