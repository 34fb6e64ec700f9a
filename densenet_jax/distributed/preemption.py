"""Handles requests to stop: the current step is finished and saved first."""

import os
import signal
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from densenet_jax.system.console import print_status


class Preempted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and has saved its state."""


def end_when_asked() -> None:
    """Lets SIGTERM and Ctrl-C end the process at once: there is nothing to finish yet."""

    def end(*_: Any) -> NoReturn:
        print_status("interrupted")
        os._exit(130)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


class StopRequest:
    """Remembers SIGTERM, SIGHUP (a lost terminal) and Ctrl-C until the step is done; a second Ctrl-C stops at once.

    With several processes any one may get the signal: JAX's own SIGTERM handler makes all of them agree on the next
    step that none has passed. A Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._together = jax.distributed.is_initialized()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT, *([] if self._together else [signal.SIGTERM])]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def due(self, step: int) -> bool:
        """Returns whether to stop after this step; all processes call it once after every step."""
        if not self._together:
            return self.received is not None
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        print_status(f"one of the {jax.process_count()} processes was asked to stop: saving after step {step}")
        return True

    def _remember(self, number: int, _: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._together:
            signal.raise_signal(signal.SIGTERM)
        else:
            print_status(f"{self.received.name} received: saving after this step")
