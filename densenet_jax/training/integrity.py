"""Checksums of a checkpoint's files, for damage that Orbax and TensorStore do not notice.

Orbax restores flipped bytes in numbers of `data/metadata`, or without a lost `metrics` item, and raises no error. So
the SHA-256 of every file is written before the checkpoint gets its final name, and its data item records that, so that
missing checksums are noticed. Checkpoints from before that mark may have none and are then read unchecked.
"""

import hashlib
import json
import logging
import os
from typing import Any

import jax
from jax.experimental import multihost_utils

from densenet_jax.errors import UserError, first_line
from densenet_jax.system.disk import replace_file
from densenet_jax.training.best_metric import score_figures

logger = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
# Written anew when Orbax gives the checkpoint its final name; nothing is read from them.
_CHANGES_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt", CHECKSUMS_FILE)

METRICS_ITEM = "metrics"  # Orbax's name of the item and of the file in it
CHECKSUMS_MARK = "checksums"  # key of the data item: this checkpoint was written with checksums
_NEEDED = ("data/metadata", "state/_METADATA")


class DamagedCheckpointError(UserError):
    """A checkpoint that differs from what was written; the message names the file."""


def write_checksums(path: str, item: str = "") -> None:
    """Writes the checksums of a checkpoint's files beside them.

    With `item`, only files of that subdirectory are new: other checksums stay, and without any, none are written.
    """
    sums = _read_checksums(path) if item else {}
    if sums is None:
        return
    sums |= {name: _checksum(os.path.join(path, name)) for name in _files(path) if name.startswith(item)}
    with replace_file(os.path.join(path, CHECKSUMS_FILE)) as file:
        file.write(json.dumps(sums, indent=1).encode())


def check_files(path: str, item: str = "") -> bool:
    """Compares a checkpoint's files (only those of the subdirectory `item`, if given) with their checksums.

    Returns False where the checkpoint was written before there were checksums.

    Raises:
        DamagedCheckpointError: a file is missing or has another content; the message names it.
    """
    sums = _read_checksums(path)
    if sums is None:
        return False
    for name, expected in sums.items():
        if item and not name.startswith(f"{item}/"):
            continue
        file = os.path.join(path, name)
        try:
            actual = _checksum(file)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} is damaged: {name} can't be read ({error.strerror})") from error
        if actual != expected:
            raise DamagedCheckpointError(
                f"{path} is damaged: {name} ({os.path.getsize(file):,} bytes) is not what was written"
            )
    return True


def weights_digest(path: str) -> str:
    """Returns a digest of a checkpoint's state by the checksums of its files, "" if it was written without."""
    sums = _read_checksums(path)
    state = sorted((name, value) for name, value in (sums or {}).items() if name.startswith("state/"))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest() if state else ""


def find_missing_file(path: str) -> str:
    """Returns the name of a file that the checkpoint at `path` has lost, "" if none; contents are not checked."""
    try:
        names = _read_checksums(path) or ()
    except DamagedCheckpointError:
        names = ()  # its damage is reported when it is read
        if not os.path.exists(os.path.join(path, CHECKSUMS_FILE)):
            return CHECKSUMS_FILE
    return next((name for name in (*_NEEDED, *names) if not os.path.isfile(os.path.join(path, name))), "")


def finished_steps(directory: str) -> list[int]:
    """Lists the steps in `directory` whose checkpoints have their final name, oldest first."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted(int(name) for name in names if name.isdigit())


def set_aside(directory: str, steps: list[int]) -> None:
    """Moves checkpoints to `damaged_checkpoints`, out of the way of new ones; deletes nothing."""
    if not steps:
        return
    aside = os.path.join(os.path.dirname(directory), "damaged_checkpoints")
    if jax.process_index() == 0:
        os.makedirs(aside, exist_ok=True)
        for step in steps:
            target = os.path.join(aside, str(step))
            while os.path.exists(target):
                target += "_again"
            os.rename(os.path.join(directory, str(step)), target)
    multihost_utils.sync_global_devices("damaged checkpoints are out of the way")


def saved_figures(path: str) -> dict[str, Any] | None:
    """Returns the figures of the validation in the checkpoint at `path`; None where it was not validated.

    Raises:
        DamagedCheckpointError: it can't be read or is not what was written.
    """
    check_files(path, METRICS_ITEM)
    file = os.path.join(path, METRICS_ITEM, METRICS_ITEM)
    if not os.path.exists(file):
        return None
    try:
        with open(file, encoding="utf-8") as opened:
            figures = json.load(opened)
        score_figures(figures)
        return figures
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{METRICS_ITEM}/{METRICS_ITEM} can't be read ({error!r})"
        raise DamagedCheckpointError(f"{path} is damaged: {why}") from error


def find_unreadable_scores(directory: str) -> list[int]:
    """Lists the steps whose metrics can't be read, which would keep Orbax from opening the directory.

    Raises:
        UserError: all of them are such steps.
    """
    damaged: list[int] = []
    steps = finished_steps(directory)
    for step in steps:
        try:
            saved_figures(os.path.join(directory, str(step)))
        except DamagedCheckpointError as error:
            if len(damaged) == len(steps) - 1:
                raise UserError(f"{error}, and there is no other; start again in a new --workdir.") from error
            logger.warning("%s; it is set aside.", error)
            damaged.append(step)
    multihost_utils.sync_global_devices("all processes have looked at the checkpoints")
    return damaged


def _read_checksums(path: str) -> dict[str, str] | None:
    try:
        with open(os.path.join(path, CHECKSUMS_FILE), encoding="utf-8") as file:
            sums = json.load(file)
        inside = isinstance(sums, dict) and all(
            isinstance(value, str) and not os.path.isabs(name) and ".." not in name.split("/")
            for name, value in sums.items()
        )
        if not inside:
            raise ValueError("it holds no checksums")
    except FileNotFoundError:
        if _is_marked(path):
            raise DamagedCheckpointError(
                f"{path} is damaged: {CHECKSUMS_FILE} is missing, with which it was written; copy it again, whole"
            ) from None
        return None
    except (OSError, ValueError) as error:
        why = f"{CHECKSUMS_FILE} can't be read ({first_line(error)})"
        raise DamagedCheckpointError(f"{path} is damaged: {why}") from error
    return sums


def _is_marked(path: str) -> bool:
    try:
        with open(os.path.join(path, "data", "metadata"), encoding="utf-8") as file:
            return CHECKSUMS_MARK in json.load(file)
    except (OSError, ValueError, TypeError):
        return False


def _files(path: str) -> list[str]:
    files = []
    for directory, _, names in os.walk(path):
        inside = os.path.relpath(directory, path)
        files += [os.path.normpath(os.path.join(inside, name)) for name in names if name not in _CHANGES_LATER]
    return sorted(name for name in files if not name.endswith(".tmp"))


def _checksum(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
