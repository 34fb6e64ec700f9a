"""Metrics of each class and the confusion matrix as CSV files."""

import csv
import dataclasses
import os
from collections.abc import Iterable, Sequence

import numpy as np

from densenet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClassTables:
    """Where the two tables go; "" leaves one out.

    Attributes:
        per_class: a line a class: its number and name, its examples, how many were predicted right, their share.
        confusion: a line a true class, a column a predicted one, the examples in the cells.
    """

    per_class: str = ""
    confusion: str = ""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.per_class or self.confusion)

    def check(self) -> None:
        """Makes the directories, so that a wrong path shows before the work and not after it.

        Raises:
            UserError: a file can't be written there; the message names it.
        """
        for path in filter(None, (self.per_class, self.confusion)):
            directory = os.path.dirname(os.path.abspath(path))
            try:
                os.makedirs(directory, exist_ok=True)
            except OSError as error:
                raise _cannot(path, error) from error
            if os.path.isdir(path) or not os.access(directory, os.W_OK):
                raise _cannot(path, "it is a directory or in one that may not be written")

    def write(self, counts: np.ndarray, names: Sequence[str], classes: Sequence[int] | None = None) -> None:
        """Writes what is wanted.

        Args:
            counts: int[k, k], examples of each true class (rows) by predicted class.
            names: of the k classes.
            classes: those to write; None: all.

        Raises:
            UserError: a file can't be written.
        """
        chosen = range(len(names)) if classes is None else classes
        if self.per_class:
            _write(self.per_class, _per_class_rows(counts, names, chosen))
        if self.confusion:
            _write(self.confusion, _confusion_rows(counts, names, chosen))


def _per_class_rows(counts: np.ndarray, names: Sequence[str], classes: Sequence[int]) -> Iterable[list[object]]:
    yield ["class_id", "class", "examples", "correct", "accuracy"]
    for number in classes:
        examples, correct = int(counts[number].sum()), int(counts[number, number])
        yield [number, names[number], examples, correct, round(correct / examples, 6) if examples else ""]


def _confusion_rows(counts: np.ndarray, names: Sequence[str], classes: Sequence[int]) -> Iterable[list[object]]:
    yield ["true class / predicted class", *(names[column] for column in classes)]
    for row in classes:
        yield [names[row], *counts[row, list(classes)].tolist()]


def _write(path: str, rows: Iterable[list[object]]) -> None:
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise _cannot(path, error) from error


def _cannot(path: str, why: object) -> UserError:
    return UserError(f"{path} can't be written ({why}); change config.eval.per_class_output or .confusion_output.")
