"""The last word of a process that C++ code ends with abort()."""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

_SPEAKING: list["LastWord"] = []  # C has only the address of what lives here


class LastWord:
    """A line on standard error and an exit status for when C++ code calls abort(), as JAX's service does.

    The handler is called in whatever thread has aborted. It takes Python's lock, which a thread of the service never
    holds.
    """

    def __init__(self) -> None:
        self._message, self._status, self._stderr = "", 1, 2
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._handler = prototype(self._speak)
        self._signal = ctypes.CDLL(None).signal
        self._signal.restype, self._signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
        self._previous: int | None = None

    def begin(self) -> None:
        """From here on it is said."""
        _SPEAKING.append(self)
        self._previous = self._signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def end(self) -> None:
        """From here on abort() does what it did before."""
        self._signal(signal.SIGABRT, self._previous)

    def change(self, message: str, status: int) -> None:
        """What is said from now on."""
        self._message, self._status = message, status

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, nothing but the last word reaches standard error; what else is written there is dropped."""
        sys.stderr.flush()
        self._stderr = os.dup(2)
        with tempfile.TemporaryFile() as held_back:
            os.dup2(held_back.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(self._stderr, 2)
                os.close(self._stderr)
                self._stderr = 2

    def _speak(self, _: int) -> None:
        os.write(self._stderr, f"error: {self._message}\n".encode())
        os._exit(self._status)
