"""The file of predictions: a JSON line an image, written so that an interrupted run goes on where it was."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from densenet_jax.errors import UserError
from densenet_jax.predict.files import digest
from densenet_jax.workdir import write_json


class PredictionFile:
    """Open for one run at a time. Beside it lies PATH.request, which says what was asked for and whether all is done.

    Attributes:
        path: of the file.
        answered: lines with predictions, those of earlier runs among them.
        refused: lines with errors, likewise.
        resumed: whether there were lines of an earlier run that are kept.
    """

    def __init__(self, path: str, request: dict[str, Any]) -> None:
        """Opens `path` and repairs its end.

        Lines of an earlier run with the same request are kept. A finished file of another request is replaced, an
        unfinished one is not.

        Args:
            path: is created where it does not exist, its folder as well.
            request: what was asked for, as JSON.

        Raises:
            UserError: the file can't be written, is no file of predictions, or holds unfinished ones of another
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
        """Whether an earlier run has a line for `name`."""
        key = np.array(digest(name), self._done.dtype)
        place = int(np.searchsorted(self._done, key))
        return place < len(self._done) and bool(self._done[place] == key)

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Appends lines; after a kill at any moment the file ends with at most one torn line, which is repaired.

        Raises:
            UserError: they can't be written.
        """
        lines = list(lines)
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._file.flush()
        except OSError as error:
            raise _cannot(self.path, error) from error
        refused = sum("error" in line for line in lines)
        self.refused += refused
        self.answered += len(lines) - refused

    def finish(self) -> None:
        """Marks that everything asked for is there."""
        self._mark(finished=True)

    def answered_names(self) -> Iterator[str]:
        """Names of the images that have predictions, in the order of the lines."""
        with open(self.path, "rb") as file:
            for line in file:
                if "error" not in (entry := json.loads(line)):
                    yield entry["image"]

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> BinaryIO:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                raise IsADirectoryError("it is no file")
            file = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            raise _cannot(self.path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise UserError(f"{self.path} is being written by another run; wait or choose another --output.") from error
        return file

    def _check_request(self) -> None:
        """Leaves the lines of an earlier run that may be continued, and removes those that may not."""
        try:
            with open(self._request_path, encoding="utf-8") as file:
                note = json.load(file)
            stored, finished = note["request"], bool(note["finished"])
        except (OSError, ValueError, LookupError, TypeError):
            return  # no note, or none that says anything: the lines are what counts
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
        """Drops what a kill left at the end and returns the sorted digests of the names that are there, S16[n]."""
        digests, good, torn = bytearray(), 0, 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if torn:
                raise UserError(
                    f"{self.path} is no file of predictions (line {torn}); choose another --output or remove it."
                )
            if (entry := _parsed(line)) is None:
                torn = number
                continue
            good += len(line)
            digests += digest(entry["image"])
            self.refused += "error" in entry
        if torn == 1 and os.path.getsize(self.path) > 0 and not self._is_torn_line():
            raise UserError(f"{self.path} is no file of predictions; choose another --output or remove it.")
        self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)
        found = np.frombuffer(bytes(digests), "S16")
        self.answered = len(found) - self.refused
        return np.sort(found)

    def _is_torn_line(self) -> bool:
        """Whether the only line is the beginning of one of ours, and not somebody's file."""
        self._file.seek(0)
        start = b'{"image": '
        return self._file.read(len(start)) == start[: os.path.getsize(self.path)]

    @property
    def _request_path(self) -> str:
        return f"{self.path}.request"

    def _mark(self, *, finished: bool) -> None:
        try:
            write_json(self._request_path, {"finished": finished, "request": self._request})
        except OSError as error:
            raise _cannot(self._request_path, error) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line of ours; None otherwise."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line) if line.endswith(b"\n") else None
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("image"), str)
            and ("predictions" in entry) != ("error" in entry)
        ):
            return entry
    return None


def _cannot(path: str, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or error
    return UserError(f"{path} can't be written ({why}); choose another --output.")
