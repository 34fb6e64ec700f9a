"""Data sets that tfds has prepared as ArrayRecord files."""

import difflib
import os
import re
import threading
from typing import Any

import numpy as np

from densenet_jax.data.convert import stored_formats
from densenet_jax.data.records import DamagedImage, Record, Source
from densenet_jax.data.settings import SINGLE, Labels
from densenet_jax.data.tfds_labels import find_fields
from densenet_jax.errors import UserError

# Archives that must be downloaded by hand.
MANUAL_ARCHIVES: dict[str, tuple[str, ...]] = {
    "imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
    "imagenet2012_real": ("ILSVRC2012_img_val.tar",),
}


def default_directory() -> str:
    """Returns where tfds keeps data sets: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"))


class ArrayRecordSource(Source):
    """A split of a tfds image classification set whose files are ArrayRecord."""

    def __init__(self, directory: str, split: str, labels: Labels = SINGLE) -> None:
        """Opens `split` of the prepared set in `directory` (the one that holds dataset_info.json)."""
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2  # since tfds's parser would import TensorFlow

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
        self.label_sets, self.many_labels = bool(self._fields.label_set), labels.many
        self._records = _open_records(builder, split, directory)
        self._parse = tf_example_pb2.Example.FromString
        self._labels: np.ndarray | None = None
        self._labels_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        name = f"{self._split}/{index}"
        try:
            fields = self._parse(self._records[index]).features.feature
        except Exception as error:  # the reader and the parser raise their own types
            raise DamagedImage(name, f"its record can't be read ({error})") from error
        known = self._fields
        if known.name:
            name = fields[known.name].bytes_list.value[0].decode("utf-8", "replace") or name
        try:
            label = known.read_label(fields)
        except (LookupError, ValueError) as error:
            raise DamagedImage(name, f"its labels can't be read ({error})") from error
        label_set = tuple(fields[known.label_set].int64_list.value) if known.label_set else ()
        return Record(fields[known.image].bytes_list.value[0], label, name, label_set)

    def labels(self) -> np.ndarray:
        """Returns every label, int32 [n] or float32 [n, k]; reads the whole split on the first call."""
        with self._labels_lock:
            if self._labels is None:
                dtype = np.float32 if self.many_labels else np.int32
                self._labels = np.stack([np.asarray(self[i].label, dtype) for i in range(len(self))])
            return self._labels


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
        paths = [path for path in root.iterdir() if match["version"] in (None, path.name)] if root.exists() else []
        versions = {
            tuple(map(int, path.name.split("."))): os.fspath(path)
            for path in paths
            if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").exists()
        }
    except Exception as error:  # no rights, no network, or no package for this kind of storage
        raise UserError(f"config.data.dir {directory} can't be read: {error}.") from error
    if not versions:
        raise UserError(not_prepared_message(match["set"], name, directory))
    random_access = [version for version, path in versions.items() if "array_record" in stored_formats(path)]
    return versions[max(random_access or versions)]


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
        source = "https://image-net.org/download-images"
        return f"{start}: download {' and '.join(archives)} from {source} into {manual}, then run {command}."
    return f"{start}: run {command}, or set config.data.dir to where it is."
