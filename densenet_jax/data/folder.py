"""Reads class folders, DIRECTORY/train/CLASS/* and DIRECTORY/val/CLASS/*."""

import hashlib
import itertools
import logging
import os

import numpy as np

from densenet_jax.data.class_names import order_classes
from densenet_jax.data.folder_index import load_or_list, subfolders
from densenet_jax.data.records import Record, Source, read_image_file, warn_of_missing
from densenet_jax.errors import UserError, list_some

logger = logging.getLogger(__name__)
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "val": ("val", "validation")}
_ALL_SPLIT_FOLDERS = ("train", "validation", "val", "test")
_NAMED = 5  # classes listed per message


class FolderSource(Source):
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
        own = subfolders(self._root)
        self.class_names = order_classes(subfolders(train) if os.path.isdir(train) else own, class_order)
        if unknown := sorted(set(own) - set(self.class_names)):
            raise UserError(f"{self._root} has class folders that {train} lacks: {', '.join(unknown[:_NAMED])}.")
        if not own:
            raise UserError(f"{self._root} has no class folders; expected {self._root}/CLASS/IMAGE.")
        self._labels, self._ends, self._names, self._sizes = load_or_list(directory, self._root, own, self.class_names)
        if not len(self._labels):
            raise UserError(f"{self._root} holds no images; expected {self._root}/CLASS/IMAGE.")
        self._check_classes(is_train=os.path.abspath(self._root) == os.path.abspath(train))

    def _check_classes(self, is_train: bool) -> None:
        empty = self.missing_classes()
        if empty and is_train:
            raise UserError(
                f"{self._root} has no images of {len(empty)} of {self.num_classes} classes: "
                f"{list_some([repr(name) for name in empty])}; add images or remove the folders."
            )
        warn_of_missing(self._root, "no images", empty, self.num_classes)
        if is_train and self.num_classes == 1:
            logger.warning("%s has one class only, %r: every answer will be right.", self._root, self.class_names[0])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        start = int(self._ends[index - 1]) if index else 0
        path = self._names[start : self._ends[index]].tobytes()
        name = f"{os.path.basename(self._root)}/{path.decode('utf-8', 'backslashreplace')}"
        image = read_image_file(os.path.join(os.fsencode(self._root), path), name)
        return Record(image=image, label=int(self._labels[index]), name=name)

    def labels(self) -> np.ndarray:
        """Returns every label, int32 [n]."""
        return self._labels

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
