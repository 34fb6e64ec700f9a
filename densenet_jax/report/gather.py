"""Predicts a whole split for the report: the answers, and the most confident mistakes."""

import collections
import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import jax
import numpy as np

from densenet_jax.scores.calibration import Reliability
from densenet_jax.scores.classes import ClassScores

T = TypeVar("T")
Batch = dict[str, np.ndarray]
# This process's shares of padded and masked batches in the order of the split, each with the outputs for the whole
# global batch, as `densenet_jax.run.evaluate.predict_batches` yields them.
Predictions = Iterable[tuple[Batch, Batch]]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A wrong prediction of one class."""

    image: np.ndarray  # uint8 or uint16 [h, w, c] as given to the model; the center crop if there are several
    index: int  # position in the split
    label: int
    predicted: int
    confidence: float  # probability of `predicted`
    label_probability: float  # probability of `label`, the true class
    activation_map: np.ndarray  # float32 [h, w], of `predicted`


@dataclasses.dataclass(frozen=True)
class LabelMistake:
    """An image with many labels and the one that the model is most wrong about; `image`, `index` as in `Mistake`."""

    image: np.ndarray
    index: int
    label: int
    present: bool  # what is true
    logit: float
    activation_map: np.ndarray  # float32 [h, w], of the label


@dataclasses.dataclass(frozen=True)
class Answers:
    """Predictions of a split with one class an image."""

    # int32 [2, n]: true and predicted class of each example in the order of the split, -1 where there is no right one.
    rows: np.ndarray
    mistakes: tuple[Mistake, ...]  # the most confident ones in this process's share, most confident first
    reliability: Reliability  # accuracy by confidence

    @functools.cached_property
    def counted(self) -> np.ndarray:
        """The columns of `rows` that have a right class."""
        return self.rows[:, self.rows[0] >= 0]

    @property
    def right(self) -> int:
        """Number of correct predictions."""
        true, predicted = self.counted
        return int(np.count_nonzero(true == predicted))

    def list_confused(self, most: int) -> list[tuple[int, int, int]]:
        """Returns the `most` frequent mistakes as (true class, predicted class, count); ties are in class order."""
        true, predicted = self.counted
        wrong = collections.Counter(zip(*self.counted[:, true != predicted].tolist(), strict=True))
        entries = ((*pair, count) for pair, count in wrong.items())
        return heapq.nsmallest(most, entries, key=lambda entry: (-entry[2], entry[:2]))

    def scores(self, num_classes: int) -> ClassScores:
        """Computes precision, recall and F1 of each class."""
        true, predicted = self.counted
        parts = (true, predicted, true[true == predicted])
        return ClassScores.from_counts(*(np.bincount(part, minlength=num_classes) for part in parts))

    def matrix(self, num_classes: int) -> np.ndarray:
        """Returns the confusion matrix, int64 [k, k]: true classes in rows, predicted ones in columns."""
        counts = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(counts, tuple(self.counted), 1)
        return counts


@dataclasses.dataclass(frozen=True)
class LabelAnswers:
    """Predictions of a split with many labels an image."""

    logits: np.ndarray  # float [n, k], before any calibration
    targets: np.ndarray  # float [n, k]: 1, 0, or NaN for unknown
    mistakes: tuple[LabelMistake, ...]  # as in `Answers`


class _Surest(Generic[T]):
    """Keeps the few most confident mistakes of a split; of equal ones the first."""

    def __init__(self, most: int, make: Callable[..., T]) -> None:
        self._most, self._make = most, make
        self._kept: list[tuple[float, int, T]] = []

    def add(self, number: int, batch: Batch, wrong: np.ndarray, surety: np.ndarray, **columns: np.ndarray) -> None:
        """Adds the mistakes in this process's share of a batch.

        Args:
            number: the batch's place in the split.
            batch: this process's share of it.
            wrong: bool [b], like the rest about the global batch.
            surety: float [b], by which mistakes are ranked.
            columns: [b, ...], fields of a mistake besides `image` and `index`.
        """
        share = len(batch["label"])
        first = jax.process_index() * share
        rows = first + np.flatnonzero(wrong[first : first + share])
        for row in rows[np.argsort(-surety[rows], kind="stable")][: self._most].tolist():
            place, image = number * len(wrong) + row, batch["image"][row - first]
            fields = {name: column[row].copy() for name, column in columns.items()}
            mistake = self._make(image=(image if image.ndim == 3 else image[-1]).copy(), index=place, **fields)
            self._kept.append((float(surety[row]), -place, mistake))
        self._kept = sorted(self._kept, key=lambda entry: entry[:2], reverse=True)[: self._most]

    def best_first(self) -> tuple[T, ...]:
        """Returns the mistakes, most confident first."""
        return tuple(mistake for *_, mistake in self._kept)


def gather_answers(predictions: Predictions, most_mistakes: int = 12) -> Answers:
    """Collects the answers for every example, and a few images.

    If an example has a set of right classes, any of them is correct; an empty set excludes the example. The outputs are
    those of `make_predict_step` and "map", float32 [b, h, w], of the predicted class.
    """
    surest: _Surest[Mistake] = _Surest(most_mistakes, Mistake)
    reliability, rows = Reliability(), [np.zeros((2, 0), np.int32)]
    for number, (batch, outputs) in enumerate(predictions):
        probabilities, labels, counted = outputs["probability"], outputs["label"], outputs["mask"]
        predicted, confidence = np.argmax(probabilities, axis=-1), np.max(probabilities, axis=-1)
        if "label_set" in outputs:
            right = outputs["label_set"]
            counted = counted & right.any(axis=-1)
            labels = np.argmax(np.where(right, probabilities, -1.0), axis=-1)
        rows.append(np.where(counted, np.stack([labels, predicted]), -1)[:, outputs["mask"]].astype(np.int32))
        reliability.add(confidence[counted], (labels == predicted)[counted])
        label_probability = np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]
        fields = {"label": labels, "predicted": predicted, "label_probability": label_probability}
        fields |= {"confidence": confidence, "activation_map": outputs["map"]}
        surest.add(number, batch, counted & (labels != predicted), confidence, **fields)
    return Answers(np.concatenate(rows, axis=1), surest.best_first(), reliability)


def gather_label_answers(predictions: Predictions, most_mistakes: int = 12) -> LabelAnswers:
    """Collects the logits of every example, and the images of a few mistakes.

    The outputs are those of `make_logits_step`, "worst" int [b], the label with the largest error, and "map" float32
    [b, h, w], its class activation map.
    """
    surest: _Surest[LabelMistake] = _Surest(most_mistakes, LabelMistake)
    logits, targets = [], []
    for number, (batch, outputs) in enumerate(predictions):
        mask, worst = outputs["mask"], outputs["worst"]
        own, true = (np.take_along_axis(outputs[name], worst[:, None], axis=-1)[:, 0] for name in ("logit", "label"))
        wrong = mask & ~np.isnan(true) & ((own >= 0) != (true > 0))
        maps = outputs["map"]
        surest.add(number, batch, wrong, np.abs(own), label=worst, present=true > 0, logit=own, activation_map=maps)
        logits.append(outputs["logit"][mask])
        targets.append(outputs["label"][mask])
    return LabelAnswers(np.concatenate(logits), np.concatenate(targets), surest.best_first())
