"""Profiles a few training steps for TensorBoard and XProf."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from densenet_jax.choices import PROFILE
from densenet_jax.errors import UserError
from densenet_jax.system.console import print_status


class Profile:
    """Traces steps STEP to STEP + COUNT - 1 into `DIR/plugins/profile/`, on process 0."""

    def __init__(self, setting: str, workdir: str, total_steps: int):
        """Parses `setting`, "" or "STEP:COUNT".

        Raises:
            UserError: the run ends before the trace does.
        """
        match = PROFILE.fullmatch(setting)
        self._first, count = (int(match[1]), int(match[2])) if match else (0, 0)
        self._last = self._first + count - 1
        if self._last > total_steps:
            raise UserError(
                f"config.profile is {setting!r}, which ends at step {self._last:,}; the run has {total_steps:,} steps."
            )
        self._workdir = workdir
        self._running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps step `number`, counted from 1; starts the trace when due."""
        if not self._first <= number <= self._last:
            yield
            return
        if not self._running and jax.process_index() == 0:
            jax.profiler.start_trace(self._workdir)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends(self, number: int, state: Any) -> None:
        """Ends the trace when due after step `number`, which gave `state`."""
        if self._running and number >= self._last:
            jax.block_until_ready(state)  # the step is only dispatched, not yet run
            self.close()

    def close(self) -> None:
        """Writes the trace if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print_status(
                f"profile: {self._workdir}/plugins/profile; tensorboard --logdir {self._workdir} shows it (with xprof)"
            )
