"""Being asked to stop: the step under way is finished and saved first."""

import signal
from typing import Any

from densenet_jax.progress import say


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """Remembers SIGTERM and Ctrl-C until the step under way is done; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        say(f"{self.received.name} received: saving after this step")
