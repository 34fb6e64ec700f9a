"""Checksums of a checkpoint's files: what Orbax and TensorStore do not notice is noticed here.

Flipped bytes in numbers of `data/metadata` or a lost `metrics` item come back from Orbax without a word (tried on every
file of a checkpoint). So the SHA-256 of every file is written while the checkpoint still has its temporary name: a
finished checkpoint always has them. Those of before this file existed have none and are read as they are.
"""

import hashlib
import json
import os

from densenet_jax.errors import UserError, first_line

CHECKSUMS_FILE = "checksums.json"
# Written anew when Orbax gives the checkpoint its final name; nothing is read from them.
_CHANGES_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt", CHECKSUMS_FILE)

METRICS_ITEM = "metrics"  # Orbax's name of the item and of the file in it


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what was written; the message names the file."""


def write_checksums(path: str, item: str = "") -> None:
    """Writes the checksums of every file of the checkpoint in the directory `path` beside them.

    Args:
        path: the checkpoint's directory.
        item: only files of this subdirectory are new; the other checksums stay, and where there are none, none are
            written. "" for all.
    """
    sums = _read(path) if item else {}
    if sums is None:
        return
    sums |= {name: _checksum(os.path.join(path, name)) for name in _files(path) if name.startswith(item)}
    temporary = os.path.join(path, f"{CHECKSUMS_FILE}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, os.path.join(path, CHECKSUMS_FILE))


def check_files(path: str, item: str = "") -> bool:
    """Compares the files of the checkpoint in the directory `path` with their checksums.

    Args:
        path: the checkpoint's directory.
        item: only files of this subdirectory; "" for all.

    Returns:
        False where the checkpoint has no checksums, since it was written before there were any.

    Raises:
        DamagedCheckpointError: a file is missing or has another content; the message names it.
    """
    sums = _read(path)
    if sums is None:
        return False
    for name, expected in sums.items():
        if item and not name.startswith(f"{item}/"):
            continue
        file = os.path.join(path, name)
        try:
            found = _checksum(file)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} is damaged: {name} can't be read ({error.strerror})") from error
        if found != expected:
            raise DamagedCheckpointError(
                f"{path} is damaged: {name} ({os.path.getsize(file):,} bytes) is not what was written"
            )
    return True


def finished_steps(directory: str) -> list[int]:
    """Steps of the checkpoints in `directory` that have their final name, oldest first."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted(int(name) for name in names if name.isdigit())


def saved_score(path: str, metric: str) -> float | None:
    """The validation's `metric` in the checkpoint at `path`; None where it was not validated.

    Raises:
        DamagedCheckpointError: it can't be read or is not what was written.
    """
    check_files(path, METRICS_ITEM)
    file = os.path.join(path, METRICS_ITEM, METRICS_ITEM)
    if not os.path.exists(file):
        return None
    try:
        with open(file, encoding="utf-8") as opened:
            return float(json.load(opened)[metric])
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = f"{METRICS_ITEM}/{METRICS_ITEM} can't be read ({error!r})"
        raise DamagedCheckpointError(f"{path} is damaged: {why}") from error


def _read(path: str) -> dict[str, str] | None:
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
        return None
    except (OSError, ValueError) as error:
        why = f"{CHECKSUMS_FILE} can't be read ({first_line(error)})"
        raise DamagedCheckpointError(f"{path} is damaged: {why}") from error
    return sums


def _files(path: str) -> list[str]:
    found = []
    for directory, _, names in os.walk(path):
        inside = os.path.relpath(directory, path)
        found += [os.path.normpath(os.path.join(inside, name)) for name in names if name not in _CHANGES_LATER]
    return sorted(name for name in found if not name.endswith(".tmp"))


def _checksum(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
