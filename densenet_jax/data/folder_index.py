"""Lists the images in class folders and keeps an index of them, which is read as long as no folder changes."""

import collections
import contextlib
import hashlib
import json
import logging
import os
import zipfile
from concurrent import futures

import numpy as np

from densenet_jax.data.headers import HEAD_BYTES, is_image_start
from densenet_jax.errors import UserError
from densenet_jax.system.disk import replace_file, user_cache

logger = logging.getLogger(__name__)
# Files with these endings are images; of others the first bytes decide.
EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".dcm")
_VERSION = 3  # index format
_LISTING_THREADS = 16  # listing waits for the disk or the network, not for a core

# Labels int32[n], ends of names int64[n], names uint8[...], sizes int64[n].
Index = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def load_or_list(directory: str, root: str, folders: list[str], class_names: tuple[str, ...]) -> Index:
    """Reads the index of an earlier listing if no folder changed since, else lists the class folders of `root`.

    Raises:
        UserError: a folder can't be read or is a link to one that it lies in.
    """
    files = index_files(directory, root)
    for file in files:
        if (index := _load(file, root, class_names)) is not None:
            return index
    index, stamp = _list(root, folders, class_names)
    for file in files:
        with contextlib.suppress(OSError):  # a read-only data set: try the next place, or list again next time
            _save(file, index, stamp)
            break
    return index


def index_files(directory: str, root: str) -> list[str]:
    """Returns where the index of `root` may be: beside the data, else in the user's cache."""
    key = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    return [os.path.join(directory, f".{os.path.basename(root)}.index.npz"), user_cache(f"{key}.index.npz")]


def _list(root: str, folders: list[str], class_names: tuple[str, ...]) -> tuple[Index, dict[str, object]]:
    label_of = {name: label for label, name in enumerate(class_names)}
    folders = sorted(folders, key=label_of.__getitem__)
    with futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
        listings = list(pool.map(lambda folder: _list_class(root, folder), folders))
    names, ends, labels, sizes, times = bytearray(), [], [], [], {}
    skipped = _count_loose_files(root)
    for folder, (images, changed, others) in zip(folders, listings, strict=True):
        times.update(changed)
        skipped.update(others)
        for image, size in images:
            names += os.fsencode(image)
            ends.append(len(names))
            sizes.append(size)
        labels += [label_of[folder]] * len(images)
    arrays = np.array(labels, np.int32), np.array(ends, np.int64), np.frombuffer(bytes(names), np.uint8)
    index = (*arrays, np.array(sizes, np.int64))
    report_skipped(root, skipped)
    return index, {"version": _VERSION, "classes": list(class_names), "folders": times, "skipped": skipped}


def _list_class(root: str, folder: str) -> tuple[list[tuple[str, int]], dict[str, int], collections.Counter[str]]:
    """Lists one class folder: sorted image paths from `root` with sizes, folders' modification times, skipped files."""
    images, times, pending = [], {}, [(folder, frozenset[tuple[int, int]]())]
    skipped: collections.Counter[str] = collections.Counter()
    while pending:
        here, above = pending.pop()
        try:
            status = os.stat(os.path.join(root, here))
            times[here] = status.st_mtime_ns
            if (identity := (status.st_dev, status.st_ino)) in above:
                raise UserError(f"Folder {os.path.join(root, here)} is a link to a folder that it lies in; remove it.")
            with os.scandir(os.path.join(root, here)) as entries:
                for entry in entries:
                    if entry.is_dir():
                        pending.append((os.path.join(here, entry.name), above | {identity}))
                    elif entry.name.startswith("."):
                        continue
                    elif is_image_file(entry):
                        images.append((os.path.join(here, entry.name), entry.stat().st_size))
                    elif entry.is_file():
                        skipped[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
                    else:
                        skipped["a broken link" if entry.is_symlink() else "no regular file"] += 1
        except OSError as error:
            raise UserError(f"Folder {os.path.join(root, here)} can't be read ({error.strerror}).") from error
    return sorted(images), times, skipped


def is_image_file(entry: "os.DirEntry[str]") -> bool:
    """Returns whether a file is an image, by its extension if known, else by its first bytes."""
    if not entry.is_file():  # reading a pipe would block
        return False
    if entry.name.lower().endswith(EXTENSIONS):
        return True
    try:
        with open(entry.path, "rb") as file:
            return is_image_start(file.read(HEAD_BYTES))
    except OSError:
        return False


def _count_loose_files(root: str) -> collections.Counter[str]:
    """Counts images beside the class folders and in folders whose names begin with ".", which are not read."""
    counts: collections.Counter[str] = collections.Counter()
    with os.scandir(root) as entries:
        hidden = sorted(entry.name for entry in entries if entry.name.startswith(".") and entry.is_dir())
    kinds = {root: "outside of class folders"}
    kinds |= {os.path.join(root, name): f"in the hidden folder {name!r}" for name in hidden}
    for folder, kind in kinds.items():
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            if images := sum(not entry.name.startswith(".") and is_image_file(entry) for entry in entries):
                counts[kind] = images
    return counts


def report_skipped(root: str, skipped: dict[str, int]) -> None:
    """Warns about files that are not read as images, by extension and count."""
    if skipped:
        counts = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts[:10])
        logger.warning("%s: %d files are not read as images (%s).", root, sum(skipped.values()), kinds)


def _save(file: str, index: Index, stamp: dict[str, object]) -> None:
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with replace_file(file) as stream:
        os.fchmod(stream.fileno(), 0o644)  # readable by all users of the data
        text = np.frombuffer(json.dumps(stamp).encode(), np.uint8)
        np.savez(stream, stamp=text, labels=index[0], ends=index[1], names=index[2], sizes=index[3])


def _load(file: str, root: str, class_names: tuple[str, ...]) -> Index | None:
    """Reads the index; returns None if there is none or a folder changed since."""
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            stamp = json.loads(stored["stamp"].tobytes())
            if stamp["version"] != _VERSION or tuple(stamp["classes"]) != class_names:
                return None
            if set(subfolders(root)) != {path for path in stamp["folders"] if os.sep not in path}:
                return None
            with futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
                paths = (os.path.join(root, path) for path in stamp["folders"])
                times = list(pool.map(lambda path: os.stat(path).st_mtime_ns, paths))
            if times != list(stamp["folders"].values()):
                return None
            report_skipped(root, stamp["skipped"])
            return stored["labels"], stored["ends"], stored["names"], stored["sizes"]
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile):
        return None


def subfolders(path: str) -> list[str]:
    """Lists the names of the folders in a folder, without hidden ones.

    Raises:
        UserError: it can't be read, or a name is not UTF-8.
    """
    try:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"Folder {path} can't be read ({error.strerror}).") from error
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"Class folder {os.fsencode(name)!r} of {path} is not UTF-8; rename it.") from error
    return names
