"""Writes predictions as JSON lines that an interrupted run can continue."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from densenet_jax.errors import UserError, report_write_errors
from densenet_jax.predict.files import digest
from densenet_jax.workdir import write_json

_REMEDY = "choose another --output"


class PredictionFile(contextlib.AbstractContextManager["PredictionFile"]):
    """File of predictions, open for one run at a time.

    PATH.request beside it records the request and whether it is done.

    Attributes:
        answered: number of lines with predictions, including those of earlier runs.
        refused: number of lines with errors, including those of earlier runs.
        resumed: whether lines of an earlier run were kept.
    """

    def __init__(self, path: str, request: dict[str, Any]) -> None:
        """Opens `path`, creating it and its folder if needed, and repairs its end.

        Lines of an earlier run with the same request are kept. A finished file of another request is replaced.

        Raises:
            UserError: the file can't be written, holds something else, or holds unfinished predictions of another
                request.
        """
        self.path, self._request = path, json.loads(json.dumps(request))
        self.answered = self.refused = 0
        self._file = self._open()
        try:
            self._check_request()
            self._done = self._keep_good_lines()
            self.resumed = len(self._done) > 0
            self._mark(finished=False)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, name: str) -> bool:
        """Returns whether an earlier run wrote a line for `name`."""
        key = np.array(digest(name), self._done.dtype)
        place = int(np.searchsorted(self._done, key))
        return place < len(self._done) and bool(self._done[place] == key)

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Appends lines; a kill leaves at most one torn line, which the next run repairs.

        Raises:
            UserError: they can't be written.
        """
        lines = list(lines)
        with report_write_errors(self.path, _REMEDY):
            self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._file.flush()
        refused = sum("error" in line for line in lines)
        self.refused += refused
        self.answered += len(lines) - refused

    def finish(self) -> None:
        """Marks the request as done."""
        self._mark(finished=True)

    def remove(self) -> None:
        """Removes the file and its request, once the predictions have been written elsewhere."""
        for path in (self.path, self._request_path):
            os.remove(path)

    def answered_names(self) -> Iterator[str]:
        """Yields the images that have predictions, in the order of the lines."""
        with open(self.path, "rb") as file:
            for line in file:
                if "error" not in (entry := json.loads(line)):
                    yield entry["image"]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> BinaryIO:
        with report_write_errors(self.path, _REMEDY):
            if "\0" in self.path or (os.path.exists(self.path) and not os.path.isfile(self.path)):
                raise OSError("it is not a file")
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            file = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise UserError(f"{self.path} is being written by another run; wait or choose another --output.") from error
        return file

    def _check_request(self) -> None:
        """Keeps the lines of an earlier run if they may be continued, else removes them."""
        try:
            with open(self._request_path, encoding="utf-8") as file:
                note = json.load(file)
            stored, finished = note["request"], bool(note["finished"])
        except (OSError, ValueError, LookupError, TypeError):
            return  # without a usable note, the lines decide
        if stored == self._request or not os.path.getsize(self.path):
            return
        if not finished:
            others = [key for key in self._request if stored.get(key) != self._request[key]]
            raise UserError(
                f"{self.path} holds unfinished predictions of another request ({', '.join(others)} differ); finish "
                "them with their own command, remove the file, or choose another --output."
            )
        self._file.truncate(0)

    def _keep_good_lines(self) -> np.ndarray:
        """Drops a torn line at the end and returns the sorted digests of the images in the file, S16 [n]."""
        digests, good, torn = bytearray(), 0, 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if torn:
                raise UserError(
                    f"{self.path} is not a file of predictions (line {torn}); choose another --output or remove it."
                )
            if (entry := _parse_line(line)) is None:
                torn = number
                continue
            good += len(line)
            digests += digest(entry["image"])
            self.refused += "error" in entry
        if torn == 1 and os.path.getsize(self.path) > 0 and not self._is_torn_line():
            raise UserError(f"{self.path} is not a file of predictions; choose another --output or remove it.")
        self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)
        self.answered = len(digests) // 16 - self.refused
        return np.sort(np.frombuffer(bytes(digests), "S16"))

    def _is_torn_line(self) -> bool:
        """Returns whether the only line is the start of a prediction, not of some other file."""
        self._file.seek(0)
        start = b'{"image": '
        return self._file.read(len(start)) == start[: os.path.getsize(self.path)]

    @property
    def _request_path(self) -> str:
        return f"{self.path}.request"

    def _mark(self, *, finished: bool) -> None:
        with report_write_errors(self._request_path, _REMEDY):
            write_json(self._request_path, {"finished": finished, "request": self._request})


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Returns the entry of a complete line of predictions, else None."""
    with contextlib.suppress(ValueError):
        entry: Any = json.loads(line) if line.endswith(b"\n") else None
        has_image = isinstance(entry, dict) and isinstance(entry.get("image"), str)
        if has_image and ("predictions" in entry) != ("error" in entry):
            return entry
    return None
