"""Reads images that a CSV or Parquet table lists, with one class or several labels each."""

import hashlib
import os
import stat
from concurrent import futures

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from densenet_jax.data.records import Record, Source, read_image_file, warn_of_missing
from densenet_jax.data.settings import SINGLE, Labels, TableSettings
from densenet_jax.data.table_rows import Rows, read_rows
from densenet_jax.errors import UserError, list_some

_SAME_SPLITS = {"val": "validation", "validation": "val"}
_STAT_THREADS, _STAT_ROWS = 16, 4096
_NAMED = 5  # values listed per message


class TableSource(Source):
    """The images of one split of a table."""

    def __init__(
        self,
        settings: TableSettings,
        directory: str = "",
        split: str = "train",
        labels: Labels = SINGLE,
        class_order: str = "text",
    ) -> None:
        """Reads the table, checks all its rows and looks for the files of this split.

        Args:
            directory: where paths begin; "": the table's own folder.
            class_order: of classes in one column, and of joined labels; see `class_names.order_classes`.

        Raises:
            UserError: the table, a column, a value or a file is missing or wrong; the message names the first.
        """
        rows = read_rows(settings, directory, labels, class_order)
        number = next((rows.splits.index(name) for name in (split, _SAME_SPLITS.get(split)) if name in rows.splits), -1)
        if number < 0:
            known = ", ".join(map(repr, rows.splits[:_NAMED]))
            raise UserError(
                f"{settings.table} has no split {split!r}; its splits are {known}. Name config.data.split_column, or "
                "set config.data.holdout=0.2 and config.data.eval_split=holdout."
            )
        mine = np.flatnonzero(rows.split == number)
        if not len(mine):
            raise UserError(f"{settings.table} has no rows of split {split!r}.")
        self._directory = rows.directory
        every = len(mine) == len(rows.split)
        self._paths = rows.paths if every else rows.paths.take(pa.array(mine))
        self._labels = rows.labels if every else rows.labels[mine]
        self._groups = rows.groups if every or rows.groups is None else rows.groups[mine]
        self.class_names = rows.class_names
        self.many_labels = labels.many
        _check_files(rows, mine, settings.table)
        if split == settings.train_split:
            what, missing = "no images", [] if labels.many else self.missing_classes()
            if labels.many:
                both = (self._labels == 1).any(axis=0) & (self._labels == 0).any(axis=0)
                what, missing = "only one kind of example", [self.class_names[label] for label in np.flatnonzero(~both)]
            warn_of_missing(f"Split {split!r} of {settings.table}", what, missing, self.num_classes)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index].as_py()
        image = read_image_file(os.path.join(self._directory, path), path)
        label = self._labels[index]
        return Record(image=image, label=label if self.many_labels else int(label), name=path)

    def labels(self) -> np.ndarray:
        """Returns every label, int32 [n] or float32 [n, labels]."""
        return self._labels

    def groups(self) -> np.ndarray | None:
        """Returns the number of each row's group, int32 [n]; None without config.data.group_column."""
        return self._groups

    def identity(self) -> list[tuple[int, str]]:
        """Returns the number of images that have each class or label, and a digest of paths and labels in order."""
        if not self.many_labels:
            chosen = [np.flatnonzero(self._labels == label) for label in range(self.num_classes)]
            return [(len(rows), _digest(self._paths.take(pa.array(rows))) if len(rows) else "") for rows in chosen]
        paths = _digest(self._paths).encode()
        digests = [hashlib.sha256(paths + column.tobytes()).hexdigest()[:16] for column in self._labels.T]
        return [(int(count), digest) for count, digest in zip((self._labels == 1).sum(axis=0), digests, strict=True)]

    def files(self) -> dict[str, int]:
        """Returns the paths in the table, without sizes."""
        return dict.fromkeys(self._paths.to_pylist(), -1)


def _digest(paths: pa.Array) -> str:
    digest = hashlib.sha256(pc.binary_length(paths).to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    for start in range(0, len(paths), 2**16):
        digest.update("".join(paths.slice(start, 2**16).to_pylist()).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _check_files(rows: Rows, chosen: np.ndarray, table: str) -> None:
    """Looks for the images of the `chosen` rows, in threads.

    Raises:
        UserError: some are missing or no files.
    """
    with futures.ThreadPoolExecutor(_STAT_THREADS) as pool:
        parts = (chosen[start : start + _STAT_ROWS] for start in range(0, len(chosen), _STAT_ROWS))
        missing = [row for part in pool.map(lambda part: _missing(rows, part), parts) for row in part]
    if missing:
        listed = list_some([f"{rows.paths[row].as_py()!r} ({rows.place(row)})" for row in missing])
        raise UserError(
            f"{len(missing)} of {len(chosen)} images that {table} lists are no files in {rows.directory}: "
            f"{listed}; set config.data.dir to where the paths begin, or remove their rows."
        )


def _missing(rows: Rows, chosen: np.ndarray) -> list[int]:
    missing, top = [], os.path.join(rows.directory, "")
    for row, path in zip(chosen.tolist(), rows.paths.take(pa.array(chosen)).to_pylist(), strict=True):
        try:
            is_file = stat.S_ISREG(os.stat(top + path).st_mode)
        except (OSError, ValueError):
            is_file = False
        if not is_file:
            missing.append(row)
    return missing
