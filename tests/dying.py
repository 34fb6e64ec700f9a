"""Runs that are watched from outside, to be hit at a chosen moment."""

import json
import pathlib
import re
import subprocess
import threading
import time
from collections.abc import Callable

import numpy as np

from tests.running import start_main

# Reports of every step and long validations, so that every kind of moment can be waited for.
SHORT_RUN = (
    "--config=configs/digits.py",
    "--config.train.epochs=4",
    "--config.optim.warmup_epochs=0.2",
    "--config.eval.every_epochs=1",
    "--config.eval.batch_size=4",
    "--config.checkpoint.every_steps=6",
    "--config.train.log_every_steps=1",
)
TOTAL_STEPS = 90
EVAL_STEPS = (23, 45, 68, 90)
_OF_THE_CLOCK = ("images_per_sec", "data_wait_fraction", "host_memory_bytes")


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


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def reports_of(workdir: pathlib.Path, split: str) -> list[dict]:
    """Reports without what the clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in _OF_THE_CLOCK} for line in lines if line["split"] == split]


def saved_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Everything in the state saved at `step`, the optimizer's included, by name."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        path = workdir / "checkpoints" / str(step) / "state"
        tree = reader.metadata(path).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def assert_same_end(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """The newest state and all reports are alike, bit for bit."""
    assert checkpoint_steps(workdir)[-1] == checkpoint_steps(other)[-1]
    step = checkpoint_steps(workdir)[-1]
    ours, theirs = saved_arrays(workdir, step), saved_arrays(other, step)
    assert ours.keys() == theirs.keys()
    assert any("opt_state" in name for name in ours)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for split in ("train", "validation"):
        assert reports_of(workdir, split) == reports_of(other, split)
