"""Reports a stalled run with the stack traces of all threads, without ending it."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

from densenet_jax.system.console import print_status

T = TypeVar("T")


class Watchdog:
    """Reports when nothing has moved on for `stall_secs`, then again after twice, four times as long and so on.

    Used in a `with`; slow work (compiling) belongs before it. Reports go to standard error and, with
    the stack traces of all threads, to `DIR/stalls.txt`; on process I of several to `DIR/stalls_I.txt`.
    """

    def __init__(self, workdir: str, stall_secs: float):
        """Prepares to write reports into `workdir`; `stall_secs` 0 never reports."""
        name = f"stalls_{jax.process_index()}.txt" if jax.process_count() > 1 else "stalls.txt"
        self.path = os.path.join(workdir, name)
        self._stall_secs = stall_secs
        self._what, self._since = "", time.monotonic()
        self._reported = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begins(self, what: str) -> None:
        """Marks the start of something new, and so the end of what was before."""
        if self._reported:
            print_status(f"it goes on after {time.monotonic() - self._since:.0f} s of {self._what}")
        self._reported = False
        self._what, self._since = what, time.monotonic()

    def each(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Yields the items, each a sign of life."""
        self.begins(what)
        for item in items:
            self.begins(what)
            yield item

    def __enter__(self) -> "Watchdog":
        self.begins("starting")
        if self._stall_secs:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        since, limit = self._since, self._stall_secs
        while not self._ended.wait(max(0.01, min(1.0, self._stall_secs / 10))):
            if self._since != since:
                since, limit = self._since, self._stall_secs
            elif time.monotonic() - since >= limit:
                self._reported = True
                self._report(self._what, time.monotonic() - since)
                limit *= 2

    def _report(self, what: str, secs: float) -> None:
        title = f"nothing has moved for {secs:.0f} s while {what}"
        print_status(
            f"warning: {title}; what every thread is doing stands below and in {self.path}. The run is not stopped."
        )
        try:
            with open(self.path, "a+", encoding="utf-8") as file:
                start = file.tell()
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
                file.writelines(f"Thread 0x{one.ident:016x} is {one.name}\n" for one in threading.enumerate())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
                file.seek(start)
                print_status(file.read())
        except OSError as error:
            print_status(f"{self.path} can't be written to: {error.strerror}")
