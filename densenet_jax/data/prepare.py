"""Prepares a data set and verifies its counts, its classes and that every image decodes."""

import functools
import glob
import os
import shutil
from concurrent import futures
from typing import Any, NamedTuple

from densenet_jax.data import convert, tfds_source
from densenet_jax.data.batches import available_cores, read_ahead
from densenet_jax.data.convert import Progress
from densenet_jax.data.decode import decode_image
from densenet_jax.data.records import DamagedImage, Source
from densenet_jax.data.settings import SINGLE, Labels, TableSettings
from densenet_jax.data.sources import open_source
from densenet_jax.errors import UserError
from densenet_jax.system.disk import locked


class KnownSet(NamedTuple):
    """A published data set: its number of classes, 0 if unknown, and the examples of each complete split."""

    classes: int
    examples: dict[str, int]


_KNOWN = {
    "imagenet2012": KnownSet(1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet2012_real": KnownSet(1000, {"validation": 50_000}),
    "imagenet_v2": KnownSet(1000, {"test": 10_000}),
    "imagenet_a": KnownSet(1000, {"test": 7_500}),
    "imagenet_r": KnownSet(1000, {"test": 30_000}),
    "cifar10": KnownSet(10, {"train": 50_000, "test": 10_000}),
    "cifar100": KnownSet(100, {"train": 50_000, "test": 10_000}),
    "svhn_cropped": KnownSet(10, {"train": 73_257, "test": 26_032, "extra": 531_131}),
    "digits": KnownSet(10, {"train": 1_437, "test": 360}),
}
_BLOCK = 64  # images checked per thread at a time


class SplitReport(NamedTuple):
    """Result of verifying one split."""

    split: str
    examples: int
    expected: int | None  # size of the complete data set; None where that is not known
    damaged: tuple[tuple[str, str], ...]  # (name, why) of every image that can't be decoded, in file order


def known_set(name: str) -> KnownSet:
    """Returns what is known of a set "set", "set/config" or "set/config:1.2.3"; nothing of other sets."""
    return _KNOWN.get(_set_name(name), KnownSet(0, {}))


def _set_name(name: str) -> str:
    return name.partition("/")[0].partition(":")[0]


def prepare_dataset(
    name: str,
    directory: str = "",
    *,
    progress: Progress = lambda *_: None,
    table: TableSettings | None = None,
    labels: Labels = SINGLE,
    **decoding: Any,
) -> list[SplitReport]:
    """Prepares what is not yet prepared and verifies all splits of it; may be repeated and interrupted.

    Digits, class folders and tables need nothing but this call. A tfds set stored as TFRecord gets ArrayRecord files
    beside it. Another tfds set is downloaded and prepared by tfds, which may need TensorFlow (`imagenet2012` does, and
    its archives in DIRECTORY/downloads/manual).

    Args:
        name: as for `open_source`, like `directory`.
        progress: called with (activity, amount done, total).
        decoding: `pixel_range` and `dicom_frame` of `densenet_jax.data.decode.decode_image`.

    Raises:
        UserError: something that only the user can do is missing; the message says what.
    """
    directory = directory if name == "table" else directory or tfds_source.default_directory()
    if name == "table":
        from densenet_jax.data.table_rows import read_rows

        splits = read_rows(table or TableSettings(""), directory, labels, "text").splits
    elif name in ("folder", "digits"):
        splits = ("train", "validation" if name == "folder" else "test")
    else:
        import tensorflow_datasets as tfds

        info = tfds.builder_from_directory(_prepare_tfds(name, directory, progress)).info
        splits = tuple(split for split in info.splits if split != "all")
    expected = known_set(name).examples
    reports = []
    for split in splits:
        source = open_source(name, directory, split, table=table, labels=labels)
        reports.append(verify_split(source, split, expected.get(split), progress, **decoding))
    return reports


def verify_split(
    source: Source, split: str, expected: int | None = None, progress: Progress = lambda *_: None, **decoding: Any
) -> SplitReport:
    """Decodes every image of `source`, as `prepare_dataset`, holding only the images in flight in memory."""
    total, done, workers = len(source), 0, available_cores()
    damaged: list[tuple[str, str]] = []
    blocks = (range(start, min(start + _BLOCK, total)) for start in range(0, total, _BLOCK))
    check = functools.partial(_list_damaged, source, **decoding)
    with futures.ThreadPoolExecutor(workers) as pool:
        for refused in read_ahead(pool, check, blocks, 2 * workers):
            damaged += refused
            done = min(done + _BLOCK, total)
            progress(f"verify {split}", done, total)
    return SplitReport(split, total, expected, tuple(damaged))


def _list_damaged(source: Source, block: range, **decoding: Any) -> list[tuple[str, str]]:
    damaged = []
    for index in block:
        try:
            record = source[index]
            if not source.many_labels and not 0 <= record.label < source.num_classes:
                raise DamagedImage(record.name, f"its label {record.label} is none of {source.num_classes} classes")
            decode_image(record.image, 0, name=record.name, bits=0, **decoding)
        except DamagedImage as error:
            damaged.append((error.name, error.why))
    return damaged


def _prepare_tfds(name: str, directory: str, progress: Progress) -> str:
    """Prepares a tfds set as ArrayRecord files and returns its directory."""
    set_name = _set_name(name)
    if "://" in directory:
        raise UserError(f"{directory} is on object storage; prepare in a local directory and copy the files there.")
    try:
        with locked(os.path.join(directory, f".{set_name}.lock")):
            if not tfds_source.is_prepared(name, directory):
                _download_and_prepare(name, set_name, directory)
            path = tfds_source.find_prepared(name, directory)
            if "array_record" not in convert.stored_formats(path):
                convert.convert_to_array_record(path, progress, available_cores())
            return path
    except OSError as error:
        raise UserError(f"{name} can't be prepared in {directory} ({error}); set config.data.dir.") from error


def _download_and_prepare(name: str, set_name: str, directory: str) -> None:
    import tensorflow_datasets as tfds

    manual = os.path.join(directory, "downloads", "manual")
    archives = tfds_source.MANUAL_ARCHIVES.get(set_name, ())
    if any(not os.path.exists(os.path.join(manual, archive)) for archive in archives):
        raise UserError(tfds_source.not_prepared_message(set_name, name, directory))
    try:
        if archives:
            import tensorflow as _  # noqa: F401  (tfds reads these archives with it)
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        for leftover in glob.glob(f"{glob.escape(os.fspath(builder.data_path))}.incomplete*"):
            shutil.rmtree(leftover)  # from a killed run: the lock keeps other writers out
        config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
        builder.download_and_prepare(download_dir=os.path.join(directory, "downloads"), download_config=config)
    except ImportError as error:
        package = "tensorflow-cpu==2.21.0" if "tensorflow" in str(error) else error.name or str(error)
        raise UserError(f"Preparing {name} needs one more package: `pip install {package}`, then repeat.") from error
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"config.data.name is {name!r}, which tfds does not know.") from error
