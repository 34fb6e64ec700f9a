"""Writes metrics to `metrics.jsonl` for scripts and to TensorBoard's event files, without TensorFlow."""

import io
import os
import socket
import time
from collections.abc import Iterable, Sequence
from typing import IO, Any

import jax
import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from densenet_jax.errors import UserError
from densenet_jax.run.metrics_file import METRICS_FILE, read_metrics
from densenet_jax.system.disk import replace_file, report_full_disk
from densenet_jax.workdir import to_json


class Writers:
    """Writes each report to every place, on process 0 alone."""

    def __init__(self, workdir: str, *, resumed_step: int = 0):
        """Opens the files of a run that resumes at `resumed_step`.

        Drops reports of later steps, which will be repeated, here and in TensorBoard.
        """
        self._file: IO[str] | None = None
        self._events: RecordWriter | None = None
        self._directory = workdir
        if jax.process_index() != 0:
            return
        with report_full_disk(workdir):
            self._open(workdir, resumed_step)

    def _open(self, workdir: str, resumed_step: int) -> None:
        path = os.path.join(workdir, METRICS_FILE)
        kept = [record for record in read_metrics(workdir) if record["step"] <= resumed_step] if resumed_step else []
        with replace_file(path) as file:
            file.writelines(f"{to_json(record)}\n".encode() for record in kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        # Not EventFileWriter: errors in its thread can't be caught.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._events = RecordWriter(open(os.path.join(workdir, name), "ab"))  # noqa: SIM115 - likewise
        self._add_event(file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(step=resumed_step + 1, session_log=started)

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Writes one report: a line {"step", "split", **values} and a scalar "split/name" for every number.

        Raises:
            UserError: the disk is full, or the work directory is gone.
        """
        if self._file is None:
            return
        if not os.path.isdir(self._directory):  # or the run would go on until it saves
            raise UserError(f"{self._directory} was removed during the run; bring it back from a copy, or train again")
        scalars = [
            summary_pb2.Summary.Value(tag=f"{split}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        with report_full_disk(self._directory):
            self._file.write(to_json({"step": step, "split": split, **values}) + "\n")
            self._file.flush()
            self._add_event(step=step, summary=summary_pb2.Summary(value=scalars))

    def describe(self, settings: Iterable[tuple[str, Any]], images: np.ndarray, titles: Sequence[str]) -> None:
        """Shows settings as a table and titled images, uint8 [n, h, w, 1 or 3], in TensorBoard."""
        rows = "\n".join(f"    {key} = {value}" for key, value in settings)
        summary = summary_pb2.Summary(value=[_text_value("settings", rows)])
        for number, (image, title) in enumerate(zip(images, titles, strict=True), start=1):
            summary.value.append(_image_value(f"augmented/{number:02d}", title, image))
        with report_full_disk(self._directory):
            self._add_event(step=0, summary=summary)

    @property
    def writes(self) -> bool:
        """Whether this process writes."""
        return self._file is not None

    def close(self) -> None:
        """Flushes everything to disk."""
        for file in (self._file, self._events):
            if file is not None:
                with report_full_disk(self._directory):
                    file.close()

    def _add_event(self, **fields: Any) -> None:
        assert self._events is not None
        self._events.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
        self._events.flush()


def _text_value(tag: str, markdown: str) -> summary_pb2.Summary.Value:
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[markdown.encode("utf-8")])
    metadata = text_metadata.create_summary_metadata(display_name=tag, description="")
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def _image_value(tag: str, title: str, pixels: np.ndarray) -> summary_pb2.Summary.Value:
    height, width, channels = pixels.shape
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(file, format="png")
    strings = [str(width).encode(), str(height).encode(), file.getvalue()]  # as TensorBoard's image plugin reads them
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=len(strings))])
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=strings, tensor_shape=shape)
    metadata = image_metadata.create_summary_metadata(display_name=tag, description=title)
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
