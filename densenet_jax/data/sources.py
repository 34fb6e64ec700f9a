"""Opens data sets with random access to encoded images and labels."""

import difflib
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from densenet_jax.data.convert import stored_formats
from densenet_jax.data.decode import DamagedImage
from densenet_jax.data.records import Record, Source
from densenet_jax.data.settings import SINGLE, Labels, TableSettings
from densenet_jax.data.tfds_labels import find_fields
from densenet_jax.errors import UserError

logger = logging.getLogger(__name__)
# Archives that must be downloaded by hand.
MANUAL_ARCHIVES: dict[str, tuple[str, ...]] = {
    "imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
    "imagenet2012_real": ("ILSVRC2012_img_val.tar",),
}
_HOLDOUT_SEED = 2012  # never changes: all runs hold out the same examples


def default_directory() -> str:
    """Returns where tfds keeps data sets: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"))


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
    if holdout < 0 or (holdout >= 1 and holdout != int(holdout)):
        raise UserError(f"config.data.holdout is {holdout!r}; expected a share below 1, a whole count, or 0.")
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
        _warn_of_missing_classes(part, split)
    return part


def _warn_of_missing_classes(source: Source, split: str) -> None:
    counts = np.bincount(source.labels(), minlength=source.num_classes)
    if missing := [name for name, count in zip(source.class_names, counts, strict=True) if not count]:
        listed = ", ".join(map(repr, missing[:5]))
        logger.warning("%s has no images of %d of %d classes: %s.", split, len(missing), source.num_classes, listed)


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


class SubsetSource:
    """The examples of another source at `indices`, in that order."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.label_sets, self.many_labels = source.label_sets, source.many_labels

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

    def identity(self) -> list[tuple[int, str]]:
        """Returns the identity of the whole source."""
        return self._source.identity()

    def files(self) -> dict[str, int]:
        """Returns those of the whole source."""
        return self._source.files()


class ArrayRecordSource:
    """A split of a tfds image classification set whose files are ArrayRecord."""

    def __init__(self, directory: str, split: str, labels: Labels = SINGLE) -> None:
        """Opens `split` of the prepared set in `directory` (the one that holds dataset_info.json)."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(directory)
        except Exception as error:
            raise UserError(f"{directory} can't be read as a tfds data set ({error}); prepare it again.") from error
        formats = stored_formats(directory)
        if "array_record" not in formats:
            raise UserError(
                f"{directory} is stored as {formats[0] or 'an unknown format'}, which has no random access; "
                f"convert it once with `python main.py --mode prepare` and the same --config."
            )
        self._split = split
        self._fields = find_fields(builder.info.features, directory, labels)
        self.class_names = self._fields.class_names
        self.num_classes = len(self.class_names)
        self.label_sets, self.many_labels = bool(self._fields.label_set), labels.many
        self._records = _open_records(builder, split, directory)
        self._parse = _example_parser()
        self._labels: np.ndarray | None = None
        self._labels_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        name = f"{self._split}/{index}"
        try:
            fields = self._parse(self._records[index])
        except Exception as error:  # the reader and the parser raise their own types
            raise DamagedImage(name, f"its record can't be read ({error})") from error
        known = self._fields
        if known.name:
            name = fields[known.name].bytes_list.value[0].decode("utf-8", "replace") or name
        try:
            label = known.read_label(fields)
        except (LookupError, ValueError) as error:
            raise DamagedImage(name, f"its labels can't be read ({error})") from error
        return Record(
            image=fields[known.image].bytes_list.value[0],
            label=label,
            name=name,
            label_set=tuple(fields[known.label_set].int64_list.value) if known.label_set else (),
        )

    def labels(self) -> np.ndarray:
        """Returns every label, int32 [n] or float32 [n, k]; reads the whole split on the first call."""
        with self._labels_lock:
            if self._labels is None:
                dtype = np.float32 if self.many_labels else np.int32
                self._labels = np.stack([np.asarray(self[i].label, dtype) for i in range(len(self))])
            return self._labels

    def groups(self) -> None:
        """Returns None: there are no groups."""

    def identity(self) -> list[tuple[int, str]]:
        """Returns []: names would have to be read record by record."""
        return []

    def files(self) -> dict[str, int]:
        """Returns {}."""
        return {}


def _open_records(builder: Any, split: str, directory: str) -> Any:
    import tensorflow_datasets as tfds

    known = sorted(builder.info.splits)
    if re.split(r"[\[+]", split)[0] not in known:
        raise UserError(f"{directory} has no split {split!r}; it has {', '.join(known)}.")
    try:
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        files = [os.fspath(part.filename) for part in builder.info.splits[split].file_instructions]
    except Exception as error:
        raise UserError(f"Split {split!r} of {directory} can't be opened ({error}).") from error
    remote = "://" in directory  # checking a thousand files there would take a minute
    if missing := [] if remote else [file for file in files if not os.path.exists(file)]:
        raise UserError(
            f"{directory} is incomplete: {len(missing)} files are missing, first {missing[0]}; prepare it again."
        )
    if not len(records):
        raise UserError(f"Split {split!r} of {directory} has no examples.")
    return records


def _example_parser() -> Callable[[bytes], Any]:
    # tfds's own protocol buffer, since tfds's parser would import TensorFlow.
    from tensorflow_datasets.proto import tf_example_pb2

    return lambda raw: tf_example_pb2.Example.FromString(raw).features.feature


def find_prepared(name: str, directory: str) -> str:
    """Finds the directory of the newest prepared version of tfds set `name`.

    Raises:
        UserError: there is none; the message says how to get it.
    """
    from etils import epath

    match = re.fullmatch(r"(?P<set>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>\d+\.\d+\.\d+))?", name)
    if not match:
        raise UserError(f"config.data.name is {name!r}; expected digits, folder, table or a tfds name like cifar10.")
    root = epath.Path(directory) / match["set"]
    if match["config"]:
        root /= match["config"]
    try:
        found = [path for path in root.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name)] if root.exists() else []
        versions = [
            (tuple(int(part) for part in path.name.split(".")), path)
            for path in found
            if (path / "dataset_info.json").exists()
        ]
    except Exception as error:  # no rights, no network, or no package for this kind of storage
        raise UserError(f"config.data.dir {directory} can't be read: {error}.") from error
    if match["version"]:
        versions = [entry for entry in versions if entry[1].name == match["version"]]
    if not versions:
        raise UserError(not_prepared_message(match["set"], name, directory))
    random_access = [entry for entry in versions if "array_record" in stored_formats(os.fspath(entry[1]))]
    return os.fspath(max(random_access or versions)[1])


def is_prepared(name: str, directory: str = "") -> bool:
    """Returns whether tfds set `name` is in `directory`, in whatever state."""
    try:
        find_prepared(name, directory or default_directory())
    except UserError:
        return False
    return True


def not_prepared_message(set_name: str, name: str, directory: str) -> str:
    """Explains in one line what to download, where to put it and how to prepare it."""
    command = "`pip install tensorflow-cpu==2.21.0`, then `python main.py --mode prepare` with the same --config"
    start = f"Data set {name} is not prepared in {directory}"
    if close := difflib.get_close_matches(set_name, ("digits", "folder", "table"), n=1, cutoff=0.75):
        return f"{start}; did you mean config.data.name={close[0]}?"
    if archives := MANUAL_ARCHIVES.get(set_name):
        manual = os.path.join(directory, "downloads", "manual")
        return (
            f"{start}: download {' and '.join(archives)} from https://image-net.org/download-images "
            f"into {manual}, then run {command}."
        )
    return f"{start}: run {command}, or set config.data.dir to where it is."
