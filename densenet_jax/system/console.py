"""Progress on standard error: a bar on a terminal, else one line per report."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

_WIDE = 110  # terminal width with room for a bar beside the figures
_LONG_SECS = 60.0  # until a note explains the delay


class _StandardError:
    """The current sys.stderr; drops output once nobody reads it or its disk is full."""

    def write(self, text: str) -> int:
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        self._call("flush")

    def _call(self, name: str, *arguments: str) -> None:
        with contextlib.suppress(AttributeError, ValueError):  # closed before or after Python's start
            try:
                getattr(sys.stderr, name)(*arguments)
            except OSError:
                drop(sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextlib.contextmanager
def redirect(descriptor: int, target: int) -> Iterator[int]:
    """Redirects a file descriptor, and so what native code writes there; yields one for where it went before."""
    kept = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield kept
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def drop(stream: IO[str]) -> None:
    """Redirects a broken standard stream to /dev/null, so that no later write and no exit fails."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


_console = Console(file=_StandardError(), highlight=False, emoji=False, soft_wrap=True)  # type: ignore[arg-type]


def _is_first() -> bool:
    import jax  # not at the top: a mistake in the settings is printed without it

    return jax.process_index() == 0


def print_status(message: str, *, everywhere: bool = False) -> None:
    """Prints one line, on process 0 alone unless `everywhere`."""
    if everywhere or _is_first():
        _console.print(message, markup=False)


def duration(secs: float) -> str:
    """Formats seconds as "h:mm:ss"."""
    whole = max(0, round(secs))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextlib.contextmanager
def spinner(what: str) -> Iterator[None]:
    """Shows that `what` is running, and afterwards how long it took; no terminal gets the latter alone."""
    start = time.perf_counter()
    note = f"{what} takes long: large networks take minutes the first time"
    explain = threading.Timer(_LONG_SECS, print_status, [note])
    explain.daemon = True
    explain.start()
    try:
        if _console.is_terminal and _is_first():
            with _console.status(what):
                yield
        else:
            yield
    finally:
        explain.cancel()
    print_status(f"{what}: {time.perf_counter() - start:.1f} s")


class Bar:
    """A progress bar over `total` steps with figures beside it."""

    def __init__(self, what: str, total: int, done: int = 0):
        """Starts at `done` steps of `total`."""
        self._what, self._total, self._start_step = what, total, done
        self._started = time.perf_counter()
        self._done = done
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if _console.is_terminal and _is_first():
            bar = [BarColumn(bar_width=20)] if _console.width >= _WIDE else []
            counts = TextColumn("{task.description} {task.completed}/{task.total}")
            figures = TextColumn("{task.fields[figures]}", markup=False)
            self._progress = Progress(SpinnerColumn(), counts, *bar, figures, console=_console, transient=True)
            self._task = self._progress.add_task(what, total=total, completed=done, figures="")
            self._progress.start()

    def advance(self, steps: int = 1) -> None:
        """Advances by `steps`."""
        self._done += steps
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)

    def move_to(self, done: int) -> None:
        """Moves to `done` steps."""
        self.advance(done - self._done)

    def figures(self, *texts: str) -> None:
        """Shows the newest figures and the time left beside the bar, or as a line where there is no terminal.

        The most important come first: a narrow terminal leaves out the last.
        """
        parts = list(texts)
        if (done := self._done - self._start_step) > 0:
            left_secs = (time.perf_counter() - self._started) / done * (self._total - self._done)
            parts.insert(0, f"left {duration(left_secs)}")
        if self._progress is None:
            print_status(f"{self._what} {self._done}/{self._total}  {'  '.join([*parts[1:], parts[0]])}")
            return
        taken = len(f"{self._what} {self._total}/{self._total}") + 4 + (21 if _console.width >= _WIDE else 0)
        while len(parts) > 1 and taken + len("  ".join(parts)) > _console.width:
            parts.pop()
        self._progress.update(self._task, figures="  ".join(parts))

    def close(self) -> None:
        """Removes the bar from the screen."""
        if self._progress is not None:
            self._progress.stop()
            _console.file.flush()
