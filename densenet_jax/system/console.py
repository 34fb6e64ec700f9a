"""What a person sees while a run goes on, on standard error: a bar on a terminal, else a line a report."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def print_status(message: str) -> None:
    """Prints one line for a person; only the first process speaks."""
    if jax.process_index() == 0:
        _console.print(message, markup=False)


def duration(secs: float) -> str:
    """Seconds as "h:mm:ss"."""
    whole = max(0, round(secs))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextlib.contextmanager
def spinner(what: str) -> Iterator[None]:
    """Shows that `what` is under way, and afterwards how long it took."""
    start = time.perf_counter()
    if _console.is_terminal and jax.process_index() == 0:
        with _console.status(what):
            yield
    else:
        print_status(f"{what} ...")
        yield
    print_status(f"{what}: {time.perf_counter() - start:.1f} s")


class Bar:
    """A bar over `total` steps with a line of figures beside it."""

    def __init__(self, what: str, total: int, done: int = 0):
        """Starts at `done` steps of `total`."""
        self._what, self._total, self._start_step = what, total, done
        self._started = time.perf_counter()
        self._done = done
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if _console.is_terminal and jax.process_index() == 0:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}"),
                console=_console,
                transient=True,
            )
            self._task = self._progress.add_task(what, total=total, completed=done, figures="")
            self._progress.start()

    def advance(self, steps: int = 1) -> None:
        """Moves on by `steps`."""
        self._done += steps
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)

    def move_to(self, done: int) -> None:
        """Stands at `done` steps."""
        self.advance(done - self._done)

    def time_left_secs(self) -> float:
        """Estimated from the mean speed since the start."""
        done = self._done - self._start_step
        if done <= 0:
            return float("inf")
        return (time.perf_counter() - self._started) / done * (self._total - self._done)

    def figures(self, text: str) -> None:
        """Shows the newest figures beside the bar, or as a line of their own where there is no terminal."""
        left = self.time_left_secs()
        text = f"{text}  left {duration(left)}" if left != float("inf") else text
        if self._progress is not None:
            self._progress.update(self._task, figures=text)
        else:
            print_status(f"{self._what} {self._done}/{self._total}  {text}")

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
            sys.stderr.flush()
