"""Where numbers go: `metrics.jsonl` for scripts and TensorBoard's event files, without TensorFlow."""

import json
import os
import time
from typing import Any

import jax
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

METRICS_FILE = "metrics.jsonl"


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Every report in `workdir/metrics.jsonl`, oldest first; a last line cut short by a kill is left out."""
    path = os.path.join(workdir, METRICS_FILE)
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


class Writers:
    """Writes each report to every place; on processes other than the first it writes nothing."""

    def __init__(self, workdir: str, *, resumed_step: int = 0):
        """Opens the files of a run that goes on from `resumed_step`.

        Reports of later steps, written by a run that died before its next checkpoint, are dropped: those steps are
        done again. TensorBoard is told to drop its own.
        """
        self._file = None
        self._events = None
        if jax.process_index() != 0:
            return
        path = os.path.join(workdir, METRICS_FILE)
        kept = [record for record in read_metrics(workdir) if record["step"] <= resumed_step] if resumed_step else []
        temporary = f"{path}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        self._events = EventFileWriter(workdir)
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(step=resumed_step + 1, session_log=started)

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Writes one report: a line {"step", "split", **values} and a scalar "split/name" for every number."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        scalars = [
            summary_pb2.Summary.Value(tag=f"{split}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        self._add_event(step=step, summary=summary_pb2.Summary(value=scalars))

    def close(self) -> None:
        """Puts everything on disk."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()

    def _add_event(self, **fields: Any) -> None:
        assert self._events is not None
        self._events.add_event(event_pb2.Event(wall_time=time.time(), **fields))
