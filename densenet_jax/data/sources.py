"""Opens data sets with random access to encoded images and labels."""

from collections.abc import Sequence

import numpy as np

from densenet_jax.data.records import Record, Source, warn_of_missing
from densenet_jax.data.settings import SINGLE, Labels, TableSettings
from densenet_jax.data.tfds_source import ArrayRecordSource, default_directory, find_prepared
from densenet_jax.errors import UserError

_HOLDOUT_SEED = 2012  # never changes: all runs hold out the same examples


def open_source(
    name: str,
    directory: str = "",
    split: str = "train",
    *,
    holdout: float = 0.0,
    class_order: str = "text",
    labels: Labels = SINGLE,
    table: TableSettings | None = None,
) -> Source:
    """Opens one split of a prepared data set.

    Args:
        name: "digits" (prepared on first use), "folder" (a tree of class folders: DIRECTORY/train/CLASS/*), "table"
            (a CSV or Parquet file, which `table` describes), or a tfds name "set", "set/config" or "set/config:1.2.3"
            that was prepared as ArrayRecord.
        directory: "" is tfds's own directory. May be a `gs://` or `s3://` path for tfds sets.
        split: a split's name, or for tfds sets also a slice such as "train[:90%]". "holdout" is the part that
            `holdout` takes away from "train".
        holdout: how much of "train" is held out: a count from 1 on or a share below 1; 0 holds nothing out. Which
            examples are held out depends only on their number, never on a run's seed; groups of a table stay whole.
        class_order: of class folders; see `densenet_jax.data.class_names.order_classes`.

    Raises:
        UserError: the data are missing, unreadable or of an unsupported kind; the message says what to do.
    """
    wanted = "train" if split == "holdout" else split
    if name == "table":
        from densenet_jax.data.table import TableSource

        source: Source = TableSource(table or TableSettings(""), directory, wanted, labels, class_order)
    else:
        source = _open_whole(name, directory or default_directory(), wanted, class_order, labels)
    if wanted != "train" or (split != "holdout" and not holdout):
        return source
    part = _hold_out(source, holdout, is_held_out=split == "holdout")
    if name == "folder":
        warn_of_missing(split, "no images", part.missing_classes(), part.num_classes)
    return part


def _open_whole(name: str, directory: str, split: str, class_order: str, labels: Labels) -> Source:
    if labels.many and name in ("folder", "digits"):
        raise UserError(f"config.data.labels is multi, but {name} has one class an image; set it to single.")
    if name == "folder":
        from densenet_jax.data.folder import FolderSource

        return FolderSource(directory, split, class_order)
    if name == "digits":
        from densenet_jax.data import digits

        digits.prepare(directory)
    return ArrayRecordSource(find_prepared(name, directory), split, labels)


def _hold_out(source: Source, holdout: float, is_held_out: bool) -> Source:
    total, groups = len(source), source.groups()
    count = int(holdout) if holdout >= 1 else round(holdout * total)
    random = np.random.RandomState(_HOLDOUT_SEED)  # whose stream is frozen by numpy
    if groups is None:
        order = random.permutation(total)
    else:  # whole groups, in the order of a permutation, until there are `count` images
        sizes = np.bincount(groups)
        ranks = random.permutation(len(sizes))
        order = np.argsort(ranks[groups], kind="stable")
        ends = np.cumsum(sizes[np.argsort(ranks)])
        count = int(ends[np.searchsorted(ends, count)]) if 0 < count <= total else count
    if not 0 < count < total:
        raise UserError(
            f"config.data.holdout is {holdout!r}, which holds out {count} of the {total} training images"
            + ("; " if groups is None else " in whole groups; ")
            + "expected at least 1 and not all of them."
        )
    return SubsetSource(source, np.sort(order[:count] if is_held_out else order[count:]))


class SubsetSource(Source):
    """The examples of another source at `indices`, in that order; the identity and the files are those of the whole."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        self.class_names, self.label_sets, self.many_labels = source.class_names, source.label_sets, source.many_labels
        self.identity, self.files = source.identity, source.files  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    def labels(self) -> np.ndarray:
        """Returns the labels of the chosen examples, int32 [n] or float32 [n, k]."""
        return self._source.labels()[self._indices]

    def groups(self) -> np.ndarray | None:
        """Returns the groups of the chosen examples, int32 [n]; None without groups."""
        groups = self._source.groups()
        return None if groups is None else groups[self._indices]
