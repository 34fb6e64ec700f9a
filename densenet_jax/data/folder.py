"""A tree of class folders: DIRECTORY/train/CLASS/* and DIRECTORY/val/CLASS/*, listed once and then kept as an index."""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from concurrent import futures

import numpy as np

from densenet_jax.data.decode import DamagedImage
from densenet_jax.data.records import Record
from densenet_jax.errors import UserError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "val": ("val", "validation")}
_VERSION = 1  # of the index's format
_LISTING_THREADS = 16  # listing waits for the disk or the network, not for a core


class FolderSource:
    """The images below one split's class folders; classes are the folders' names in alphabetical order."""

    def __init__(self, directory: str, split: str) -> None:
        """Lists DIRECTORY/SPLIT, or reads the index of an earlier listing if no folder changed since.

        Classes are those of DIRECTORY/train where that exists, so that labels mean the same in every split.

        Raises:
            UserError: a folder is missing or unreadable, or holds no images in class folders.
        """
        self._root = _split_folder(directory, split)
        self._split = split
        own = _subfolders(self._root)
        train = os.path.join(directory, "train")
        self.class_names: tuple[str, ...] = tuple(_subfolders(train) if os.path.isdir(train) else own)
        if unknown := sorted(set(own) - set(self.class_names)):
            raise UserError(f"{self._root} has class folders that {train} lacks: {', '.join(unknown[:5])}.")
        if not own:
            raise UserError(f"{self._root} has no class folders; expected {self._root}/CLASS/IMAGE.")
        self.num_classes = len(self.class_names)
        self.label_sets = False
        self._labels, self._ends, self._names = _load_or_list(directory, self._root, own, self.class_names)
        if not len(self._labels):
            raise UserError(f"{self._root} holds no images; files that end in {', '.join(EXTENSIONS)} are read.")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        start = int(self._ends[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : self._ends[index]].tobytes())
        try:
            with open(os.path.join(self._root, name), "rb") as file:
                image = file.read()
        except OSError as error:
            raise DamagedImage(f"{self._split}/{name}", error.strerror or str(error)) from error
        return Record(image=image, label=int(self._labels[index]), name=f"{self._split}/{name}")

    def labels(self) -> np.ndarray:
        """int32[n]: every label."""
        return self._labels


def _split_folder(directory: str, split: str) -> str:
    folders = _SPLIT_FOLDERS.get(split, (split,))
    for folder in folders:
        if os.path.isdir(path := os.path.join(directory, folder)):
            return path
    raise UserError(
        f"Folder {os.path.join(directory, folders[0])} does not exist; config.data.dir must hold a folder for each "
        f"split, with one folder of images for each class: train/CLASS/IMAGE, val/CLASS/IMAGE."
    )


def _subfolders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"Folder {path} can't be read ({error.strerror}).") from error


Index = tuple[np.ndarray, np.ndarray, np.ndarray]  # labels int32[n], ends of names int64[n], names uint8[...]


def _load_or_list(directory: str, root: str, folders: list[str], class_names: tuple[str, ...]) -> Index:
    files = index_files(directory, root)
    for file in files:
        if (index := _load(file, root, class_names)) is not None:
            return index
    index, stamp = _list(root, folders, class_names)
    for file in files:
        with contextlib.suppress(OSError):  # a read-only data set: the next place, or list again next time
            _save(file, index, stamp)
            break
    return index


def index_files(directory: str, root: str) -> list[str]:
    """Where the index of `root` may lie: beside the data, else in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    key = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    return [
        os.path.join(directory, f".{os.path.basename(root)}.index.npz"),
        os.path.join(cache, "densenet_jax", f"{key}.index.npz"),
    ]


def _list(root: str, folders: list[str], class_names: tuple[str, ...]) -> tuple[Index, dict[str, object]]:
    label_of = {name: label for label, name in enumerate(class_names)}
    with futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = list(pool.map(lambda folder: _list_class(root, folder), folders))
    names, labels, times = bytearray(), [], {}
    ends = []
    for folder, (images, changed) in zip(folders, found, strict=True):
        times.update(changed)
        for image in images:
            names += os.fsencode(image)
            ends.append(len(names))
        labels += [label_of[folder]] * len(images)
    index = np.array(labels, np.int32), np.array(ends, np.int64), np.frombuffer(bytes(names), np.uint8)
    return index, {"version": _VERSION, "classes": list(class_names), "folders": times}


def _list_class(root: str, folder: str) -> tuple[list[str], dict[str, int]]:
    """Images below one class folder as sorted paths from `root`, and when each folder last changed."""
    images, times, pending = [], {}, [folder]
    while pending:
        here = pending.pop()
        try:
            times[here] = os.stat(os.path.join(root, here)).st_mtime_ns
            with os.scandir(os.path.join(root, here)) as entries:
                for entry in entries:
                    if entry.is_dir():
                        pending.append(os.path.join(here, entry.name))
                    elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                        images.append(os.path.join(here, entry.name))
        except OSError as error:
            raise UserError(f"Folder {os.path.join(root, here)} can't be read ({error.strerror}).") from error
    return sorted(images), times


def _save(file: str, index: Index, stamp: dict[str, object]) -> None:
    """Writes the index so that the file is whole at every moment."""
    os.makedirs(os.path.dirname(file), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(file), prefix=".index-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            text = np.frombuffer(json.dumps(stamp).encode(), np.uint8)
            os.fchmod(handle, 0o644)  # for everybody who reads the data
            np.savez(stream, stamp=text, labels=index[0], ends=index[1], names=index[2])
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _load(file: str, root: str, class_names: tuple[str, ...]) -> Index | None:
    """The index, or None where there is none or a folder changed since."""
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            stamp = json.loads(stored["stamp"].tobytes())
            if stamp["version"] != _VERSION or tuple(stamp["classes"]) != class_names:
                return None
            if set(_subfolders(root)) != {path for path in stamp["folders"] if os.sep not in path}:
                return None
            with futures.ThreadPoolExecutor(_LISTING_THREADS) as pool:
                paths = (os.path.join(root, path) for path in stamp["folders"])
                times = list(pool.map(lambda path: os.stat(path).st_mtime_ns, paths))
            if times != list(stamp["folders"].values()):
                return None
            return stored["labels"], stored["ends"], stored["names"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
