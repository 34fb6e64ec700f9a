"""Reads and checks the rows of a table: paths, splits, groups and labels."""

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from densenet_jax.data import table_file
from densenet_jax.data.settings import Labels, TableSettings
from densenet_jax.data.table_file import Columns, Place
from densenet_jax.data.table_labels import read_labels
from densenet_jax.errors import UserError

logger = logging.getLogger(__name__)
_SPLIT = "{split}"  # stands in config.data.table for the name of a split


@dataclasses.dataclass(frozen=True)
class Rows:
    """All rows of a table, checked."""

    directory: str  # where the paths begin
    paths: pa.Array
    split: np.ndarray  # int32 [n], each row's place in `splits`; -1 for a row of no split
    splits: tuple[str, ...]
    labels: np.ndarray  # int32 [n], or float32 [n, labels]
    class_names: tuple[str, ...]
    groups: np.ndarray | None  # int32 [n]
    place: Place


def read_rows(settings: TableSettings, directory: str, labels: Labels, class_order: str) -> Rows:
    """Reads and checks the whole table; splits that are opened one after the other share one reading.

    Raises:
        UserError: as for `TableSource`.
    """
    check_settings(settings, labels)
    files = _table_files(settings, directory)
    folder = os.path.dirname(next(iter(files.values())))
    read = [*files.values(), *(_find(file, folder) for _, file in settings.split_lists)]
    stamps = tuple((os.path.abspath(path), _stamp(path)) for path in read)
    return _read_rows(settings, directory, labels, class_order, tuple(files.items()), stamps)


def check_settings(settings: TableSettings, labels: Labels) -> None:
    """Checks that the settings of a table agree with each other.

    Raises:
        UserError: they don't.
    """
    if not settings.table:
        raise UserError("config.data.table is empty; expected a .csv or .parquet file that lists the images.")
    columns = settings.label_columns
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"config.data.label_columns has {twice!r} twice; name each column once.")
    if other := next((key for key, name in settings.columns()[1:] if name == settings.image_column), ""):
        raise UserError(f"config.data.{other} names the column {settings.image_column!r}, which is the image_column.")
    if not labels.many and len(columns) > 1:
        raise UserError(
            f"config.data.label_columns has {len(columns)} columns, but config.data.labels is single; set it to multi, "
            "or name the one column with the class names."
        )
    if settings.label_separator and (not labels.many or len(columns) > 1):
        raise UserError(
            f"config.data.label_separator is {settings.label_separator!r}; it needs config.data.labels=multi and one "
            "label column."
        )
    ways: list[tuple[str, object]] = [
        ("split_column", settings.split_column),
        ("split_lists", settings.split_lists),
        ("table", settings.table if _SPLIT in settings.table else ""),
    ]
    if len(used := [f"config.data.{key}={value!r}" for key, value in ways if value]) > 1:
        raise UserError(f"{' and '.join(used)} both name the splits; keep one.")


def _table_files(settings: TableSettings, directory: str) -> dict[str, str]:
    """Finds the table's file for each split; "" stands for all splits."""
    if _SPLIT not in settings.table:
        return {"": _find(settings.table, directory)}
    splits = dict.fromkeys((settings.train_split, settings.eval_split))
    return {split: _find(settings.table.replace(_SPLIT, split), directory) for split in splits if split != "holdout"}


def _find(path: str, directory: str) -> str:
    below = os.path.join(directory, path)
    return below if not os.path.exists(path) and os.path.exists(below) else path


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=1)
def _read_rows(
    settings: TableSettings,
    directory: str,
    labels: Labels,
    class_order: str,
    files: tuple[tuple[str, str], ...],
    stamps: tuple[tuple[str, tuple[int, int]], ...],
) -> Rows:
    del stamps  # a changed file is read again
    root = directory or os.path.dirname(files[0][1]) or "."
    if not os.path.isdir(root):
        raise UserError(f"config.data.dir is {root!r}, which does not exist; name the folder where paths begin.")
    parts = [_read_file(settings, path) for _, path in files]
    columns = {name: _concatenate([part[name] for part in parts]) for name in parts[0]}
    counts = [len(part[settings.image_column]) for part in parts]
    of_file = np.repeat(np.arange(len(parts), dtype=np.int32), counts)

    def place(row: int) -> str:  # below the header, from 1 on
        return f"{files[of_file[row]][1]} row {row + 1 - sum(counts[: of_file[row]])}"

    paths = _inside(columns[settings.image_column], root, place)
    split, splits = _splits(settings, columns, paths, dict(files), of_file)
    _check_distinct(paths, split, splits, place)
    groups = None
    if settings.group_column:
        groups = table_file.full_codes(columns[settings.group_column], settings.group_column, place)
        _check_groups(columns[settings.group_column], groups, split, splits, settings.group_column)
    target, names = read_labels(settings, columns, labels, class_order, place)
    return Rows(root, paths, split, splits, target, names, groups, place)


def _read_file(settings: TableSettings, path: str) -> Columns:
    known = table_file.column_names(path)
    if not settings.label_columns:
        shown = ", ".join(map(repr, known[:8]))
        raise UserError(f"config.data.label_columns is (); expected columns of {path}, which has {shown}.")
    wanted = settings.columns()
    table_file.check_columns(path, known, wanted)
    return table_file.read_columns(path, [name for _, name in wanted], plain=settings.image_column)


def _concatenate(arrays: Sequence[pa.Array]) -> pa.Array:
    if len(arrays) == 1:
        return arrays[0]
    if not pa.types.is_dictionary(arrays[0].type):
        return pa.concat_arrays(arrays)
    as_text = [pa.DictionaryArray.from_arrays(one.indices, one.dictionary.cast(pa.string())) for one in arrays]
    return pa.chunked_array(as_text).unify_dictionaries().combine_chunks()


def _inside(paths: pa.Array, root: str, place: Place) -> pa.Array:
    """Makes paths relative to `root`."""
    if paths.null_count:
        raise UserError(f"{place(table_file.first_row(pc.is_null(paths)))} names no image.")
    if _is_plain(paths):
        return paths
    if (row := table_file.first_row(pc.equal(paths, ""))) >= 0:
        raise UserError(f"{place(row)} names no image.")
    top = os.path.join(os.path.abspath(root), "")
    paths = pc.if_else(pc.starts_with(paths, top), pc.utf8_slice_codeunits(paths, len(top)), paths)
    paths = pc.replace_substring_regex(pc.replace_substring_regex(paths, r"/(\./|/)+", "/"), r"^\./", "")
    outside = pc.match_substring_regex(paths, r"^/|(^|/)\.\.(/|$)|\x00")
    if (row := table_file.first_row(outside)) >= 0:
        raise UserError(f"{place(row)} names the image {paths[row].as_py()!r}, which leaves config.data.dir {root}.")
    return paths


def _is_plain(paths: pa.Array) -> bool:
    """Returns whether all paths are relative and without parts that are empty or begin with a dot; may miss some."""
    _, offsets, data = paths.buffers()
    ends = np.frombuffer(offsets, np.int64)[paths.offset : paths.offset + len(paths) + 1]
    text = memoryview(data)[ends[0] : ends[-1]].tobytes()
    if (ends[1:] == ends[:-1]).any() or any(part in text for part in (b"/.", b"//", b"\0")):
        return False
    return not np.isin(np.frombuffer(text, np.uint8)[ends[:-1] - ends[0]], list(b"/.")).any()


def _splits(
    settings: TableSettings, columns: Columns, paths: pa.Array, files: dict[str, str], of_file: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    if settings.split_lists:
        return _listed_splits(settings, paths, next(iter(files.values())))
    if not settings.split_column:
        return of_file, tuple(name or "train" for name in files)
    column = columns[settings.split_column]
    names = [str(value).strip() if value is not None else "" for value in column.dictionary.to_pylist()]
    distinct = tuple(dict.fromkeys(name for name in names if name))
    if not distinct:
        raise UserError(f"config.data.split_column {settings.split_column!r} is empty in all rows.")
    numbers = np.array([distinct.index(name) if name else -1 for name in names] + [-1], np.int32)
    split = numbers[table_file.codes(column)]
    if unused := int((split < 0).sum()):
        logger.warning("%d rows of %s name no split and are not used.", unused, settings.table)
    return split, distinct


def _listed_splits(settings: TableSettings, paths: pa.Array, table: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads config.data.split_lists: for each split a text file with the path of an image in each line."""
    split = np.full(len(paths), -1, np.int32)
    splits = tuple(dict.fromkeys(name for name, _ in settings.split_lists))
    for name, file in settings.split_lists:
        file = _find(file, os.path.dirname(table))
        try:
            with open(file, encoding="utf-8-sig") as stream:
                lines = [line for line in map(str.strip, stream) if line]
        except (OSError, ValueError) as error:
            raise UserError(f"{file} of config.data.split_lists can't be read ({error}).") from error
        listed = pa.array(lines, pa.large_string())
        if (row := table_file.first_row(pc.invert(pc.is_in(listed, paths)))) >= 0:
            raise UserError(f"{file} lists {lines[row]!r}, which {table} lacks.")
        mine = pc.is_in(paths, listed).to_numpy(zero_copy_only=False)
        number = splits.index(name)
        if (row := table_file.first_row(mine & (split >= 0) & (split != number))) >= 0:
            both = f"{splits[split[row]]!r} and {name!r}"
            raise UserError(f"{file} lists {paths[row].as_py()!r}, which config.data.split_lists puts into {both}.")
        split[mine] = number
    if unused := int((split < 0).sum()):
        logger.warning("%d rows of %s are in no list of a split and are not used.", unused, table)
    return split, splits


def _check_distinct(paths: pa.Array, split: np.ndarray, splits: tuple[str, ...], place: Place) -> None:
    if pair := table_file.first_duplicate(paths):
        first, second = pair
        path, rows = paths[first].as_py(), f"{place(first)} and {place(second)}"
        if split[first] != split[second]:
            both = " and ".join(repr(splits[split[row]]) if split[row] >= 0 else "none" for row in pair)
            raise UserError(f"Image {path!r} is in two splits, {both} ({rows}); keep one row.")
        raise UserError(f"Image {path!r} is in two rows ({rows}); keep one row.")


def _check_groups(
    column: pa.DictionaryArray, groups: np.ndarray, split: np.ndarray, splits: tuple[str, ...], name: str
) -> None:
    used = split >= 0
    last = np.full(len(column.dictionary), -1, np.int32)
    last[groups[used]] = split[used]
    moved = used & (last[groups] != split)
    if (row := table_file.first_row(moved)) >= 0:
        group = groups[row]
        both = f"{splits[split[row]]!r} and {splits[last[group]]!r}"
        more = len(np.unique(groups[moved])) - 1
        raise UserError(
            f"Group {column.dictionary[int(group)].as_py()!r} of column {name!r} is in two splits, {both}"
            + (f", and so are {more} more" if more else "") + "; put all rows of a group into one."
        )  # fmt: skip
