"""Reads class folders, DIRECTORY/train/CLASS/* and DIRECTORY/val/CLASS/*, and caches an index of them."""

import collections
import contextlib
import hashlib
import itertools
import json
import logging
import os
import zipfile
from concurrent import futures

import numpy as np

from densenet_jax.data.class_names import order_classes
from densenet_jax.data.decode import HEAD_BYTES, DamagedImage, is_image_start
from densenet_jax.data.records import Record
from densenet_jax.errors import UserError, list_some
from densenet_jax.system.disk import replace_file, user_cache

logger = logging.getLogger(__name__)
# Files with these endings are images; of others the first bytes decide.
EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".dcm")
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "val": ("val", "validation")}
_ALL_SPLIT_FOLDERS = ("train", "validation", "val", "test")
_VERSION = 3  # index format
_LISTING_THREADS = 16  # listing waits for the disk or the network, not for a core
_NAMED = 5  # classes listed per message


class FolderSource:
    """The images below one split's class folders."""

    def __init__(self, directory: str, split: str, class_order: str = "text") -> None:
        """Lists DIRECTORY/SPLIT, or reads the index of an earlier listing if no folder changed since.

        Classes are the folders of DIRECTORY/train where that exists, so that labels mean the same in every split.
        Without split folders "train" is the directory itself, one folder of images per class.

        Raises:
            UserError: a folder is missing or unreadable, has a name that is not UTF-8, or holds no images.
        """
        if not os.path.isdir(directory):
            wrong = "is not a folder" if os.path.exists(directory) else "does not exist"
            raise UserError(f"config.data.dir is {directory!r}, which {wrong}; name the folder of your images.")
        train = os.path.join(directory, "train")
        if split == "train" and not any(os.path.isdir(os.path.join(directory, name)) for name in _ALL_SPLIT_FOLDERS):
            train = directory  # class folders without splits; config.data.holdout makes two of them
        self._root = train if split == "train" and train == directory else _split_folder(directory, split)
        own = _subfolders(self._root)
        self.class_names = order_classes(_subfolders(train) if os.path.isdir(train) else own, class_order)
        if unknown := sorted(set(own) - set(self.class_names)):
            raise UserError(f"{self._root} has class folders that {train} lacks: {', '.join(unknown[:_NAMED])}.")
        if not own:
            raise UserError(f"{self._root} has no class folders; expected {self._root}/CLASS/IMAGE.")
        self.num_classes = len(self.class_names)
        self.label_sets = self.many_labels = False
        self._labels, self._ends, self._names, self._sizes = _load_or_list(directory, self._root, own, self.class_names)
        if not len(self._labels):
            raise UserError(f"{self._root} holds no images; expected {self._root}/CLASS/IMAGE.")
        self._check_classes(is_train=os.path.abspath(self._root) == os.path.abspath(train))

    def _check_classes(self, is_train: bool) -> None:
        counts = np.bincount(self._labels, minlength=self.num_classes)
        empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        listed = list_some([repr(name) for name in empty])
        if empty and is_train:
            raise UserError(
                f"{self._root} has no images of {len(empty)} of {self.num_classes} classes: {listed}; add images or "
                "remove the folders."
            )
        if empty:
            logger.warning(
                "%s has no images of %d of %d classes: %s.", self._root, len(empty), self.num_classes, listed
            )
        if is_train and self.num_classes == 1:
            logger.warning("%s has one class only, %r: every answer will be right.", self._root, self.class_names[0])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        start = int(self._ends[index - 1]) if index else 0
        path = self._names[start : self._ends[index]].tobytes()
        name = f"{os.path.basename(self._root)}/{path.decode('utf-8', 'backslashreplace')}"
        try:
            with open(os.path.join(os.fsencode(self._root), path), "rb") as file:
                image = file.read()
        except OSError as error:
            raise DamagedImage(name, error.strerror or str(error)) from error
        return Record(image=image, label=int(self._labels[index]), name=name)

    def labels(self) -> np.ndarray:
        """Returns every label, int32 [n]."""
        return self._labels

    def groups(self) -> None:
        """Returns None: there are no groups."""

    def identity(self) -> list[tuple[int, str]]:
        """Returns the image count of each class and a digest of the paths below its folder."""
        starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
        classes = []
        for label, name in enumerate(self.class_names):
            mine = np.flatnonzero(self._labels == label)
            if not len(mine):
                classes.append((0, ""))
                continue
            first, last = starts[mine[0]], self._ends[mine[-1]]  # a class's images are contiguous
            prefix = np.arange(len(name.encode()) + 1)
            kept = np.ones(last - first, bool)
            kept[(starts[mine] - first)[:, None] + prefix[None, :]] = False
            digest = hashlib.sha256(self._names[first:last][kept].tobytes())
            digest.update((self._ends[mine] - starts[mine] - len(prefix)).astype(np.int64).tobytes())
            classes.append((len(mine), digest.hexdigest()[:16]))
        return classes

    def files(self) -> dict[str, int]:
        """Returns the size of each file by its path below the split's folder, as of the last listing."""
        names, ends = self._names.tobytes(), [0, *self._ends.tolist()]
        paths = (os.fsdecode(names[start:end]) for start, end in itertools.pairwise(ends))
        return dict(zip(paths, self._sizes.tolist(), strict=True))


def find_split_folders(directory: str, split: str) -> list[str]:
    """Returns those folders of DIRECTORY that can be the split: val or validation stand for each other."""
    folders = _SPLIT_FOLDERS.get(split, (split,))
    return [path for folder in folders if os.path.isdir(path := os.path.join(directory, folder))]


def _split_folder(directory: str, split: str) -> str:
    there = find_split_folders(directory, split)
    if len(there) > 1:
        logger.warning("%s is there besides %s and is not read.", there[1], there[0])
    if there:
        return there[0]
    looked_for = " or ".join(os.path.join(directory, folder) for folder in _SPLIT_FOLDERS.get(split, (split,)))
    raise UserError(
        f"Folder {looked_for} does not exist; config.data.dir must hold a folder for each split, with one folder of "
        "images for each class (train/CLASS/IMAGE, val/CLASS/IMAGE), or none for this one, with "
        "--config.data.holdout=0.2 to hold out a fifth of the training images."
    )


def _subfolders(path: str) -> list[str]:
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


# Labels int32[n], ends of names int64[n], names uint8[...], sizes int64[n].
Index = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _load_or_list(directory: str, root: str, folders: list[str], class_names: tuple[str, ...]) -> Index:
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
    return [
        os.path.join(directory, f".{os.path.basename(root)}.index.npz"),
        user_cache(f"{key}.index.npz"),
    ]


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
                    else:
                        skipped[_kind_of(entry)] += 1
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


def _kind_of(entry: "os.DirEntry[str]") -> str:
    if not entry.is_file():
        return "a broken link" if entry.is_symlink() else "no regular file"
    return os.path.splitext(entry.name)[1].lower() or "no ending"


def _count_loose_files(root: str) -> collections.Counter[str]:
    """Counts images beside the class folders and in folders whose names begin with ".", which are not read."""
    counts: collections.Counter[str] = collections.Counter()
    for folder, kind in [(root, "outside of class folders"), *_hidden_folders(root)]:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            if images := sum(not entry.name.startswith(".") and is_image_file(entry) for entry in entries):
                counts[kind] = images
    return counts


def _hidden_folders(root: str) -> list[tuple[str, str]]:
    with os.scandir(root) as entries:
        hidden = sorted(entry.name for entry in entries if entry.name.startswith(".") and entry.is_dir())
    return [(os.path.join(root, name), f"in the hidden folder {name!r}") for name in hidden]


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
            if set(_subfolders(root)) != {path for path in stamp["folders"] if os.sep not in path}:
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
