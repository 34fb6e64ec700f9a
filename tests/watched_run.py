"""Runs that are watched from outside, to be hit at a chosen moment."""

import re
import subprocess
import threading
import time
from collections.abc import Callable

from tests.main_processes import start_main

# Reports of every step and long validations, so that every kind of moment can be waited for. One wide layer: the
# checkpoints are as large as those of the recipe's network, which takes four times as long to trace and to compile.
SHORT_RUN = (
    "--config=configs/digits.py",
    "--config.model.block_sizes=(1,)",
    "--config.model.growth_rate=44",
    "--config.train.epochs=4",
    "--config.optim.warmup_epochs=0.2",
    "--config.eval.every_epochs=1",
    "--config.eval.batch_size=4",
    "--config.checkpoint.every_steps=6",
    "--config.train.log_every_steps=1",
)
TOTAL_STEPS = 90
EVAL_STEPS = (23, 45, 68, 90)


class Run:
    """`main.py` under way; its standard error is read as it comes."""

    def __init__(self, *arguments: str, **changes: str):
        self.process = start_main(*arguments, **changes)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def errors(self) -> str:
        return "".join(self.lines)

    def wait_for(self, condition: Callable[[], object], timeout_secs: float = 900) -> bool:
        """Whether `condition` came true before the process ended."""
        deadline = time.monotonic() + timeout_secs
        while not (met := bool(condition())) and self.process.poll() is None:
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.001)
        return met

    def says(self, pattern: str) -> bool:
        """Whether standard error has a match so far."""
        return re.search(pattern, self.errors) is not None

    def steps_reported(self) -> list[int]:
        return [int(step) for step in re.findall(r"^training (\d+)/", self.errors, re.MULTILINE)]

    def end(self, timeout_secs: float = 900) -> int:
        """Waits for the end and returns the exit status."""
        try:
            status = self.process.wait(timeout_secs)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return status

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()
