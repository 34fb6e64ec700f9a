"""Converts the label columns of a table to classes or to several labels."""

import numpy as np
import pyarrow as pa

from densenet_jax.data.class_names import order_classes
from densenet_jax.data.settings import Labels, TableSettings
from densenet_jax.data.table_file import Columns, Place, codes, first_row, full_codes
from densenet_jax.errors import UserError


def read_labels(
    settings: TableSettings, columns: Columns, labels: Labels, class_order: str, place: Place
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the label of each row, int32 [n] or float32 [n, labels], and the names of classes or labels.

    Raises:
        UserError: a value means no label; the message has its row.
    """
    if settings.label_separator:
        return _joined(settings, columns[settings.label_columns[0]], labels, class_order)
    if labels.many:
        names = settings.label_columns
        targets = np.empty((len(columns[names[0]]), len(names)), np.float32)
        for at, name in enumerate(names):
            targets[:, at] = _numbers(columns[name], name, labels, place)
        return targets, names
    name = settings.label_columns[0]
    column = columns[name]
    # A categorical column of a Parquet file may have values that no row has.
    used, dense = np.unique(full_codes(column, name, place), return_inverse=True)
    classes = [str(value) for value in column.dictionary.take(pa.array(used)).to_pylist()]
    names = order_classes(classes, class_order)
    number = {one: place for place, one in enumerate(names)}
    return np.array([number[one] for one in classes], np.int32)[dense], names


def _numbers(column: pa.DictionaryArray, name: str, labels: Labels, place: Place) -> np.ndarray:
    """Converts a label column of 1, 0, -1 (uncertain) and NaN or nothing (empty) to targets, float32 [n]."""
    values = np.full(len(column.dictionary) + 1, np.nan, np.float32)  # the last for nulls, whose code is -1
    places = codes(column)
    for code, value in enumerate(column.dictionary.to_pylist()):
        try:
            values[code] = float(value) if value not in (None, "") else np.nan
            right = values[code] in (0, 1, -1) or np.isnan(values[code])
        except (TypeError, ValueError):
            right = False
        if not right and (row := first_row(places == code)) >= 0:
            raise UserError(
                f"{place(row)} has {value!r} in column {name!r}; expected 1, 0, -1 (uncertain) or nothing (unknown). A "
                "column of class names needs config.data.labels=single, or config.data.label_separator."
            )
    return labels.resolve(values)[places]


def _joined(
    settings: TableSettings, column: pa.DictionaryArray, labels: Labels, class_order: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Converts a column of joined names, such as "Edema|Effusion", to float32 [n, labels]."""
    none, separator = settings.label_none, settings.label_separator
    cells = [None if value is None else str(value) for value in column.dictionary.to_pylist()] + [None]
    parts = [
        None if cell is None or (cell == "" and none) else {part.strip() for part in cell.split(separator)}
        for cell in cells
    ]
    names = order_classes({part for each in parts if each for part in each if part not in ("", none)}, class_order)
    if not names:
        raise UserError(f"config.data.label_columns {settings.label_columns[0]!r} names no labels.")
    values = np.array([[np.nan if each is None else name in each for name in names] for each in parts], np.float32)
    return labels.resolve(values)[codes(column)], names
