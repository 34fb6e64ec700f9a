"""The user's cache, files that several processes may write, and errors of a full disk as UserError."""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator
from typing import IO, Any

from densenet_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the process's limit (ulimit -f)
_FULL_MESSAGES = tuple(os.strerror(number) for number in _FULL)


def user_cache(name: str) -> str:
    """Returns the path of a file or folder of this package in the user's cache, which need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "densenet_jax", name)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Holds a lock file exclusively on this machine; the kernel releases it when the process dies."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def replace_file(path: str, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Writes a file atomically, whoever else writes it: opens a neighboring one, synced and moved to `path` at the end.

    An error inside leaves `path` as it was and no other file.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def report_full_disk(directory: str) -> Iterator[None]:
    """Turns any error that a full disk causes inside into one message.

    Raises:
        UserError: something inside could not be written to `directory` because the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # TensorStore's own errors hold the kernel's message
        why = _why_full(error)
        if why is None:
            raise
        # The save's remaining writes never start and would otherwise warn when they are freed.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        free = shutil.disk_usage(directory).free
        raise UserError(
            f"{directory} can't be written to: {why} ({free / 2**20:,.1f} MiB are free there). What was saved before "
            "is whole; make room and give the same command again: it goes on from the newest checkpoint."
        ) from error


def check_room(directory: str, byte_count: int) -> None:
    """Checks that the disk of a directory, which need not exist yet, has room for `byte_count` bytes.

    Raises:
        UserError: it hasn't.
    """
    place = os.path.abspath(directory)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if free < byte_count:
        raise UserError(
            f"{directory} can't be written to: a checkpoint needs up to {byte_count / 2**20:,.1f} MiB and "
            f"{free / 2**20:,.1f} MiB are free there; make room or choose another --workdir."
        )


def drop_late_errors(unraisable: Any) -> None:
    """Drops the leftovers of a failed save, as `sys.unraisablehook`.

    TensorStore prints them when many writes fail at once and Orbax has stopped listening after the first.
    """
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _why_full(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return os.strerror(error.errno)
        for message in _FULL_MESSAGES:
            if message in str(error):
                return message
        error = error.__cause__ or error.__context__
    return None
