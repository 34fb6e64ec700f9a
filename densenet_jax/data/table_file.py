"""Reads columns of CSV and Parquet files with pyarrow, each distinct value once."""

import csv
import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from densenet_jax.errors import UserError, first_line

Columns = dict[str, pa.Array]
Place = Callable[[int], str]  # says where a row is, for messages
_BLOCK_BYTES = 16 * 2**20
_DELIMITERS = (",", ";", "\t")
_SHOWN = 8  # columns listed per message


def column_names(path: str) -> tuple[str, ...]:
    """Reads the names of the columns.

    Raises:
        UserError: the file can't be read or has no header.
    """
    return _read(path, lambda: tuple(parquet.read_schema(path).names) if _is_parquet(path) else _csv_header(path)[0])


def read_columns(path: str, columns: Sequence[str], plain: str) -> Columns:
    """Reads some columns of a table.

    Args:
        columns: names of the columns that `column_names` has.
        plain: the column to read as plain text; the others are dictionary-encoded (of a CSV file as text).

    Returns:
        One array per column.

    Raises:
        UserError: the file is damaged, has no rows, or has a column of another type.
    """
    wanted = list(dict.fromkeys((plain, *columns)))
    read = _read_parquet if _is_parquet(path) else _read_csv
    table = _read(path, lambda: read(path, wanted, plain))
    if not table.num_rows:
        raise UserError(f"config.data.table {path} has no rows.")
    return _read(path, lambda: {name: _whole(table[name], is_plain=name == plain) for name in wanted})


def _whole(column: pa.ChunkedArray, is_plain: bool) -> pa.Array:
    if is_plain:
        column = column.cast(pa.large_string())
    elif not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = column if is_plain else column.unify_dictionaries()
    array = chunks.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def codes(column: pa.DictionaryArray) -> np.ndarray:
    """Returns the place of each row's value in the dictionary, int32 [n]; -1 for a null."""
    return column.indices.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False)


def check_columns(path: str, known: Sequence[str], wanted: Sequence[tuple[str, str]]) -> None:
    """Checks that the table has the columns; `wanted` are pairs of a setting and the column that it names.

    Raises:
        UserError: one is missing; the message has the nearest name.
    """
    for key, name in wanted:
        if known.count(name) > 1:
            raise UserError(f"{path} has {known.count(name)} columns named {name!r}; give each a name of its own.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            more = ", ..." if len(known) > _SHOWN else ""
            raise UserError(
                f"config.data.{key} names the column {name!r}, which {path} lacks; the nearest is {close[0]!r} (its "
                f"first line must name the columns and has {', '.join(map(repr, known[:_SHOWN]))}{more})."
            )


def _is_parquet(path: str) -> bool:
    return path.lower().endswith((".parquet", ".pq"))


def _read(path: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, pa.ArrowException, csv.Error, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)[:300].rstrip(".")
        raise UserError(
            f"config.data.table {path} can't be read ({why}); expected a .csv or .parquet file with a header."
        ) from error


def _csv_header(path: str) -> tuple[tuple[str, ...], str]:
    """Reads the names in the first line, and the delimiter: a comma, or a semicolon or tab if there is no comma."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        start = file.read(2**20)
    line = start.split("\n", 1)[0]
    delimiter = next((one for one in _DELIMITERS if one in line), ",")
    names = tuple(next(csv.reader(start.splitlines(keepends=True), delimiter=delimiter), ()))
    if not any(names):
        raise ValueError("its first line names no columns")
    return names, delimiter


def _read_csv(path: str, columns: list[str], plain: str) -> pa.Table:
    _, delimiter = _csv_header(path)
    encoded = pa.dictionary(pa.int32(), pa.string())
    return arrow_csv.read_csv(
        path,
        read_options=arrow_csv.ReadOptions(block_size=min(_BLOCK_BYTES, max(os.path.getsize(path), 2**16))),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=columns, column_types={name: pa.string() if name == plain else encoded for name in columns}
        ),
    )


def _read_parquet(path: str, columns: list[str], plain: str) -> pa.Table:
    texts = [field.name for field in parquet.read_schema(path) if pa.types.is_string(field.type)]
    encoded = [name for name in columns if name in texts and name != plain]
    return parquet.read_table(path, columns=columns, read_dictionary=encoded)


def first_duplicate(values: pa.LargeStringArray) -> tuple[int, int] | None:
    """Returns the first two rows that hold one value; None if all differ."""
    encoded = values.dictionary_encode()
    if len(encoded.dictionary) == len(values):
        return None
    places = codes(encoded)
    order = np.argsort(places, kind="stable")
    same = np.flatnonzero(places[order][1:] == places[order][:-1])
    first = same[np.argmin(order[same + 1])]
    return int(order[first]), int(order[first + 1])


def first_row(mask: pa.Array | np.ndarray) -> int:
    """Returns the place of the first True, or -1."""
    values = mask if isinstance(mask, np.ndarray) else mask.to_numpy(zero_copy_only=False)
    return int(np.argmax(values)) if values.any() else -1


def full_codes(column: pa.DictionaryArray, name: str, place: Place) -> np.ndarray:
    """Returns the codes of a column that must not be empty."""
    values = codes(column)
    empty = [code for code, value in enumerate(column.dictionary.to_pylist()) if value is None or value == ""]
    if (row := first_row(np.isin(values, [-1, *empty]))) >= 0:
        raise UserError(f"{place(row)} has nothing in column {name!r}; give each row a value.")
    return values
