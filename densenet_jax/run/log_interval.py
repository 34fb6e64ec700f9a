"""Collects the steps between two reports."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.errors import UserError
from densenet_jax.training.metrics import ClassificationSums, LabelSums
from densenet_jax.training.nonfinite import describe, leaf_names
from densenet_jax.training.state import TrainState
from densenet_jax.training.steps import StepReport

Sums = ClassificationSums | LabelSums
_LARGE_BYTES = 64 * 2**20


def runs_alone(step: Any) -> bool:
    """Whether a compiled step should end before the next one begins: on a CPU, if its temporaries are large.

    XLA takes them anew for every step. Steps that are queued there take theirs before those of the step before them are
    free, so that a process holds two blocks of them.
    """
    if jax.default_backend() != "cpu":
        return False
    memory = step.memory_analysis()
    return memory is not None and memory.temp_size_in_bytes >= _LARGE_BYTES


def wait_for_end(report: Any) -> None:
    """Waits for a step's results, and for the thread that frees its temporaries just after them."""
    jax.block_until_ready(report)
    time.sleep(0.001)


class Window:
    """Everything since the last report. Reading it waits for the device, so it is read once per report."""

    def __init__(self, step: int, state: TrainState, empty: Sums, begun: dict[str, Any] | None = None):
        """Starts after `step` steps.

        Args:
            empty: sums over no example.
            state: any tree like the run's state, for the names in an error.
            begun: the result of `begun()` before a restart in the middle of a window.
        """
        self._parameters, self._statistics = leaf_names(state.params), leaf_names(state.batch_stats)
        self._reports: list[StepReport] = []
        self._step = step
        self._examples = 0
        self._data_wait_secs = 0.0
        self._started = time.perf_counter()
        self.sums: Any = empty
        if begun is not None:
            dtypes = {field.name: getattr(empty, field.name).dtype for field in dataclasses.fields(empty)}
            self.sums = type(empty)(**{name: jnp.asarray(begun[name], dtypes[name]) for name in dtypes})

    def add(self, report: StepReport, examples: int, data_wait_secs: float) -> None:
        """Adds a dispatched step; waits for the one two before it, to keep the queue short."""
        self._reports.append(report)
        self._examples += examples
        self._data_wait_secs += data_wait_secs
        if len(self._reports) > 2:
            jax.block_until_ready(self._reports[-3])

    def check_finite(self) -> None:
        """Reads the outstanding steps.

        Raises:
            UserError: a loss or gradient is not finite; the message names the step.
        """
        reports, self._reports = jax.device_get(self._reports), []
        for report in reports:
            self._step += 1
            for what, value in (("loss", report.sums.loss), ("gradient norm", report.grad_norm)):
                if not np.isfinite(value):
                    raise UserError(
                        f"the {what} is {float(value)} at step {self._step}{self._where(report)}; the checkpoints "
                        "before it are untouched. Lower config.optim.learning_rate or lengthen "
                        "config.optim.warmup_epochs, in a new --workdir."
                    )
            self.sums = self.sums.merge(report.sums)

    def _where(self, report: StepReport) -> str:
        """Names the faulty parts: running statistics for the forward pass, gradients for the backward pass."""
        places = [
            describe("running statistics", report.faulty_statistics, self._statistics),
            describe("parameters' gradients", report.faulty_gradients, self._parameters),
        ]
        faults = "; ".join(filter(None, places))
        return f" (not finite: {faults})" if faults else ""

    def begun(self) -> dict[str, Any]:
        """Returns the sums so far as plain numbers and lists, for a checkpoint; call `check_finite` first."""
        return {field.name: getattr(self.sums, field.name).tolist() for field in dataclasses.fields(self.sums)}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps time spent inside (validation, saving) out of the throughput."""
        jax.block_until_ready(self._reports)
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def speed(self) -> dict[str, float]:
        """Returns throughput and the share of time spent waiting for data since the start of this window."""
        secs = time.perf_counter() - self._started
        return {
            "images_per_sec": round(self._examples / secs, 2),
            "data_wait_fraction": round(self._data_wait_secs / secs, 4),
        }
