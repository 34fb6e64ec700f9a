"""Prints a line and sets the exit status when C++ code calls abort()."""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

from densenet_jax.system.console import redirect

_SPEAKING: list["LastWord"] = []  # keeps handlers alive: C holds only their address


class LastWord:
    """Handles abort() in C++ code, as JAX's service calls it, with a line on standard error and an exit status.

    The handler runs in the aborting thread. It takes Python's lock, which a thread of the service never holds.
    """

    def __init__(self) -> None:
        self._message, self._status, self._stderr = "", 1, 2
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._handler = prototype(self._speak)
        self._signal = ctypes.CDLL(None).signal
        self._signal.restype, self._signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
        self._previous: int | None = None

    def begin(self) -> None:
        """Installs the SIGABRT handler."""
        _SPEAKING.append(self)
        self._previous = self._signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def end(self) -> None:
        """Restores the previous SIGABRT handler."""
        self._signal(signal.SIGABRT, self._previous)

    def change(self, message: str, status: int) -> None:
        """Sets the line and the exit status."""
        self._message, self._status = message, status

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Drops everything written to standard error inside, except the handler's line."""
        sys.stderr.flush()
        try:
            with tempfile.TemporaryFile() as held_back, redirect(2, held_back.fileno()) as self._stderr:
                yield
        finally:
            self._stderr = 2

    def _speak(self, _: int) -> None:
        os.write(self._stderr, f"error: {self._message}\n".encode())
        os._exit(self._status)
