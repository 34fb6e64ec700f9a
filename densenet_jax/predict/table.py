"""Writes predictions as a CSV or Parquet table, one row an image."""

import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, TextIO

from densenet_jax.errors import UserError, report_write_errors
from densenet_jax.system.disk import replace_file

SUFFIXES = (".csv", ".parquet")
_CHUNK = 1024  # rows converted at a time
_FIRST_COLUMNS = ("image", "label", "probability")
_LAST_COLUMN = "error"


def is_table(path: str) -> bool:
    """Returns whether predictions at this path are written as a table, not as JSON lines."""
    return path.lower().endswith(SUFFIXES)


def column_names(class_names: Sequence[str], topk: int, *, decided: bool = False) -> tuple[str, ...]:
    """Names the columns of a table.

    "image", "label" and "probability" come first and "error" last. Between them stand "label_2", "probability_2" and so
    on for the next classes, or if `topk` is 0, a column for each class with its probability; a class name that is
    taken already gets its number appended. If labels are `decided`, a column such as "Edema_predicted" follows each.
    """
    if topk:
        pairs = [(f"label_{place}", f"probability_{place}") for place in range(2, min(topk, len(class_names)) + 1)]
        return (*_FIRST_COLUMNS, *itertools.chain(*pairs), _LAST_COLUMN)
    names = dict.fromkeys((*_FIRST_COLUMNS, _LAST_COLUMN))
    for class_id, name in enumerate(map(_to_utf8, class_names)):
        pair = [name, f"{name}_predicted"] if decided else [name]
        if not names.keys().isdisjoint(pair):
            pair = [each.replace(name, f"{name} ({class_id})", 1) for each in pair]
        names |= dict.fromkeys(pair)
    classes = tuple(names)[len(_FIRST_COLUMNS) + 1 :]
    return (*_FIRST_COLUMNS, *classes, _LAST_COLUMN)


def check_table(path: str) -> None:
    """Checks that a table may be written to `path`.

    Raises:
        UserError: the file there is not a table of predictions.
    """
    if not os.path.lexists(path):
        return
    try:
        columns = _read_columns(path)
    except (OSError, ValueError):
        columns = []
    if tuple(columns[: len(_FIRST_COLUMNS)]) != _FIRST_COLUMNS or columns[-1] != _LAST_COLUMN:
        raise UserError(f"{path} is not a table of predictions; choose another --output or remove it.")


def write_table(path: str, lines_path: str, class_names: Sequence[str], topk: int, *, decided: bool = False) -> None:
    """Writes the JSON lines of a `PredictionFile` as a .csv or .parquet table, atomically and in little memory.

    Args:
        topk: number of classes of an image; 0 means all, see `column_names`.
        decided: whether the lines say of every label if it is predicted.

    Raises:
        UserError: the table can't be written.
    """
    columns = column_names(class_names, topk, decided=decided)
    with (
        report_write_errors(path, "choose another --output"),
        open(lines_path, encoding="utf-8") as lines,
        replace_file(path) as file,
    ):
        rows = (_make_row(json.loads(line), columns, topk, decided) for line in lines)
        if path.lower().endswith(".csv"):
            plain = ([str(cell).lower() if isinstance(cell, bool) else cell for cell in row] for row in rows)
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            write_csv(text, itertools.chain([columns], plain))
            text.detach()  # leaves the file open
        else:
            _write_parquet(file, columns, rows, topk, decided)


def _make_row(entry: Mapping[str, Any], columns: Sequence[str], topk: int, decided: bool) -> list[Any]:
    """Returns a value for each column; None leaves a cell empty."""
    image, predictions = _to_utf8(entry["image"]), entry.get("predictions", ())
    if not predictions:
        return [image, *(None,) * (len(columns) - 2), entry["error"]]
    best = predictions[0]
    if topk:
        pairs = [(_to_utf8(each["label"]), each["probability"]) for each in predictions]
        cells = list(itertools.chain(*pairs))
    else:
        fields = ("probability", "predicted") if decided else ("probability",)
        by_class = {each["class_id"]: [each[field] for field in fields] for each in predictions}
        count = (len(columns) - 4) // len(fields)
        each_class = (by_class.get(class_id, (None,) * len(fields)) for class_id in range(count))
        cells = [_to_utf8(best["label"]), best["probability"], *itertools.chain(*each_class)]
    return [image, *cells, *(None,) * (len(columns) - 2 - len(cells)), None]


def write_csv(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Writes rows as CSV; quotes those with a carriage return, which Python leaves bare between line feeds."""
    plain = csv.writer(file, lineterminator="\n")
    quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for row in rows:
        (quoting if any(isinstance(cell, str) and "\r" in cell for cell in row) else plain).writerow(row)


def _write_parquet(
    file: IO[bytes], columns: Sequence[str], rows: Iterator[list[Any]], topk: int, decided: bool
) -> None:
    import pyarrow
    from pyarrow import parquet

    last = len(columns) - 1
    is_text = [place in (0, 1, last) or (topk > 0 and place % 2 == 1) for place in range(len(columns))]
    types = [pyarrow.string() if text else pyarrow.float32() for text in is_text]
    if decided:
        types[len(_FIRST_COLUMNS) + 1 : last : 2] = [pyarrow.bool_()] * ((last - len(_FIRST_COLUMNS)) // 2)
    schema = pyarrow.schema(list(zip(columns, types, strict=True)))
    with parquet.ParquetWriter(file, schema) as writer:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            arrays = [pyarrow.array(cells, kind) for cells, kind in zip(zip(*chunk, strict=True), types, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _read_columns(path: str) -> list[str]:
    if path.lower().endswith(".csv"):
        with open(path, newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    from pyarrow import parquet

    return list(parquet.read_schema(path).names)


def _to_utf8(name: str) -> str:
    """Escapes bytes of a file name that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
