"""Copies the TFRecord files of a prepared tfds set to ArrayRecord files, which have random access."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from densenet_jax.errors import UserError
from densenet_jax.system.disk import replace_file

Progress = Callable[[str, int, int], None]  # (activity, amount done, total)
_INFO = "dataset_info.json"


def stored_formats(directory: str) -> tuple[str, ...]:
    """Returns the file formats of the prepared set in `directory`; () if there is none."""
    from etils import epath

    try:
        info = json.loads((epath.Path(directory) / _INFO).read_text())
    except (OSError, ValueError):
        return ()
    return (info.get("fileFormat", ""), *info.get("alternativeFileFormats", ()))


def convert_to_array_record(directory: str, progress: Progress, workers: int = 4) -> None:
    """Writes ArrayRecord files beside the TFRecord files in `directory` and registers them with tfds.

    An interrupted conversion resumes: files get their names when they are complete. Needs no TensorFlow. Ignores the
    checksums inside TFRecord; verification decodes every image afterwards.

    Raises:
        UserError: a file is missing, damaged or can't be written.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    shards = [shard for split in builder.info.splits.values() for shard in _shards(split)]
    done = 0
    with futures.ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(_convert_shard, *shard) for shard in shards]
        try:
            for finished in futures.as_completed(pending):
                finished.result()
                done += 1
                progress("convert to ArrayRecord", done, len(shards))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _announce(directory)


def _shards(split: Any) -> Iterator[tuple[str, str, int]]:
    """Yields (TFRecord file, ArrayRecord file, number of records) of every shard."""
    target = split.filename_template.replace(filetype_suffix="array_record")
    targets = target.sharded_filepaths(len(split.shard_lengths))
    for source, destination, length in zip(split.filepaths, targets, split.shard_lengths, strict=True):
        yield os.fspath(source), os.fspath(destination), length


def _convert_shard(source: str, destination: str, length: int) -> None:
    from array_record.python import array_record_module
    from grain.experimental import TFRecordIterDataset

    if os.path.exists(destination) and _count(destination) == length:
        return
    temporary = f"{destination}.{os.getpid()}.tmp"
    writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1")
    try:
        count = 0
        for record in TFRecordIterDataset(source):
            writer.write(record)
            count += 1
        writer.close()  # completes the file
        if count != length:
            raise ValueError(f"it has {count} records instead of {length}")
        os.replace(temporary, destination)
    except (OSError, ValueError, RuntimeError) as error:
        with contextlib.suppress(OSError, RuntimeError):
            writer.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise UserError(f"{source} can't be converted ({error}); mend or prepare it again, then repeat.") from error


def _count(file: str) -> int:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(file)
        count = reader.num_records()
        reader.close()
        return count
    except RuntimeError:  # incomplete
        return -1


def _announce(directory: str) -> None:
    """Adds the format to dataset_info.json atomically."""
    path = os.path.join(directory, _INFO)
    with open(path, encoding="utf-8") as file:
        info = json.load(file)
    info["alternativeFileFormats"] = [*info.get("alternativeFileFormats", []), "array_record"]
    with replace_file(path, "w", encoding="utf-8") as file:
        json.dump(info, file, indent=2)
