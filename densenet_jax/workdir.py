"""Work directories: each held by one run at a time, and bound to one set of settings."""

import contextlib
import fcntl
import json
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from densenet_jax.config import to_dict
from densenet_jax.config.run_settings import check_settings, differences, read_settings
from densenet_jax.data.class_names import LABELS_FILE, format_labels, read_labels
from densenet_jax.data.identity import is_contradiction
from densenet_jax.distributed import processes
from densenet_jax.errors import UserError
from densenet_jax.system.console import print_status
from densenet_jax.system.disk import replace_file, report_full_disk
from densenet_jax.training.integrity import finished_steps

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_run_in(workdir: str) -> Iterator[Callable[[], None]]:
    """Holds the work directory for this run; the lock ends with process 0, however it ends.

    Yields:
        A function that checks that the directory is still there and held; call it before saving.

    Raises:
        UserError: another run holds it, or the directory can't be made.
    """
    if "://" in workdir:
        raise UserError(f"--workdir {workdir} is no directory; mount the bucket (gcsfuse) and name the mount's path.")
    if not processes.is_first():
        yield lambda: None
        return
    is_new = not os.path.isdir(workdir)
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} can't be used: {error.strerror}; choose another.") from error
    locks = [_lock(workdir)]

    def check() -> None:
        if not os.path.isfile(os.path.join(workdir, "config.json")):
            raise UserError(
                f"--workdir {workdir} was removed or emptied during the run, and what was saved there with it; bring "
                "it back from a copy, or train again."
            )
        if not _is_file_of(locks[-1], os.path.join(workdir, ".lock")):
            locks.append(_lock(workdir))
            logger.warning("%s/.lock was removed during the run; it is there again.", workdir)

    try:
        yield check
    except UserError:
        _remove_unused(workdir, is_new)
        raise
    finally:
        for lock in locks:
            os.close(lock)


def _remove_unused(workdir: str, is_new: bool) -> None:
    """Removes what a refused command has made: the lock, and of a new directory everything if nothing was trained."""
    with contextlib.suppress(OSError):
        names = set(os.listdir(workdir))
        if is_new and names <= {".lock", "config.json", LABELS_FILE, "checkpoints"}:
            if "checkpoints" in names:
                os.rmdir(os.path.join(workdir, "checkpoints"))  # fails if there is one, and keeps the rest
            for name in names - {"checkpoints"}:
                os.unlink(os.path.join(workdir, name))
            os.rmdir(workdir)
        elif names == {".lock"}:
            os.unlink(os.path.join(workdir, ".lock"))


def _lock(workdir: str) -> int:
    path = os.path.join(workdir, ".lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        what = (
            "a link, which is not followed; remove it" if os.path.islink(path) else f"{error.strerror}; choose another"
        )
        raise UserError(f"--workdir {workdir} can't be used: .lock: {what}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(f"--workdir {workdir} is in use by another run; wait for its end or choose another.") from error
    return lock


def _is_file_of(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def to_json(content: Any, **options: Any) -> str:
    """Returns `content` as standard JSON, which has no NaN and Infinity: these become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), allow_nan=False, **options)


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes `content` atomically: to a neighboring file first, then moved into place."""
    with replace_file(path) as file:
        file.write(f"{to_json(content, indent=2)}\n".encode())


def labels_path(workdir: str) -> str:
    """Returns the path of a run's class names, for users of its checkpoints without the data set."""
    return os.path.join(workdir, LABELS_FILE)


def write_labels(workdir: str, class_names: Sequence[str], *, keep_others: bool = False) -> None:
    """Writes the names of the classes into `workdir`, one a line.

    Args:
        keep_others: keep an existing file of other names if they don't contradict.
    """
    path = labels_path(workdir)
    if not processes.is_first():
        return
    try:
        there = read_labels(path)
    except UserError:
        there = ()
    if there != tuple(class_names) and not (keep_others and not is_contradiction(there, class_names)):
        with replace_file(path) as file:
            file.write(format_labels(class_names).encode())


def claim_workdir(workdir: str, config: Any, defaults: Mapping[str, Any] | None = None) -> None:
    """Writes the resolved settings into `workdir`, or checks that the run there was started with equal ones.

    A directory without a finished checkpoint holds nothing worth keeping and is taken over by other settings. Process 0
    writes; the others check whether they share the directory with it.

    Raises:
        UserError: the directory belongs to a run with other settings (the message lists them) or its `config.json`
            can't be read.
    """
    path = os.path.join(workdir, "config.json")
    current = to_dict(config)
    if processes.is_first():
        if os.path.exists(path) and finished_steps(os.path.join(workdir, "checkpoints")):
            check_settings(workdir, config, defaults)
            before, now = (settings["model"]["dtype"] for settings in (read_settings(workdir), current))
            if before != now:
                print_status(f"continuing in {now} what {before} began")
        elif os.path.exists(path) and (changed := differences(read_settings(workdir), current, defaults)):
            print_status(f"{workdir} has no finished checkpoint and is started anew ({'; '.join(changed)})")
        if not os.path.exists(path) or read_settings(workdir) != current:
            with report_full_disk(workdir):
                write_json(path, current)
    processes.wait_for_all("the settings are written")
    if not os.path.exists(path):
        raise UserError(
            f"--workdir {workdir} of process {jax.process_index()} on {socket.gethostname()} is not that of the first "
            "process; name a directory that all hosts share."
        )
