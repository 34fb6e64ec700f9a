"""Metrics of each class and the confusion matrix as CSV files."""

import dataclasses
import io
import os
from collections.abc import Iterable, Sequence

import numpy as np

from densenet_jax.errors import report_write_errors
from densenet_jax.predict.table import write_csv
from densenet_jax.scores.classes import ClassScores

_REMEDY = "change config.eval.per_class_output or .confusion_output"


@dataclasses.dataclass(frozen=True)
class ClassTables:
    """Paths of the two tables; "" leaves one out."""

    per_class: str = ""  # table with a row a class, see `per_class_rows`
    confusion: str = ""  # table with a row a true class and a column a predicted one, counting examples

    @property
    def wanted(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.per_class or self.confusion)

    def check(self) -> None:
        """Makes the directories, so that a wrong path shows before the work.

        Raises:
            UserError: a file can't be written there; the message names it.
        """
        for path in filter(None, (self.per_class, self.confusion)):
            directory = os.path.dirname(os.path.abspath(path))
            with report_write_errors(path, _REMEDY):
                os.makedirs(directory, exist_ok=True)
                if os.path.isdir(path) or not os.access(directory, os.W_OK):
                    raise OSError("it is a directory or in one that may not be written")

    def write(self, counts: np.ndarray, names: Sequence[str], classes: Sequence[int] | None = None) -> None:
        """Writes the tables of counts int [k, k], true classes in rows, for `classes` or all.

        Raises:
            UserError: a file can't be written.
        """
        chosen = range(len(names)) if classes is None else classes
        if self.per_class:
            scores = ClassScores.from_confusion(counts)
            _write(self.per_class, to_csv(per_class_rows(scores, names, chosen)))
        if self.confusion:
            _write(self.confusion, to_csv(_confusion_rows(counts, names, chosen)))


def per_class_rows(scores: ClassScores, names: Sequence[str], classes: Sequence[int]) -> Iterable[list[object]]:
    """Yields a heading and a row a class; a score that is NaN is an empty cell."""
    yield ["class_id", "class", "examples", "correct", "accuracy", "precision", "recall", "f1"]
    for number in classes:
        cells = (scores.recall[number], scores.precision[number], scores.recall[number], scores.f1[number])
        rounded = ["" if np.isnan(cell) else round(float(cell), 6) for cell in cells]
        yield [number, names[number], int(scores.examples[number]), int(scores.right[number]), *rounded]


def to_csv(rows: Iterable[list[object]]) -> bytes:
    """Formats rows as CSV in UTF-8."""
    text = io.StringIO()
    write_csv(text, rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _confusion_rows(counts: np.ndarray, names: Sequence[str], classes: Sequence[int]) -> Iterable[list[object]]:
    yield ["true class / predicted class", *(names[column] for column in classes)]
    for row in classes:
        yield [names[row], *counts[row, list(classes)].tolist()]


def _write(path: str, content: bytes) -> None:
    with report_write_errors(path, _REMEDY), open(path, "wb") as file:
        file.write(content)
