"""Predicts a whole split for the report: confusion counts and the most confident mistakes."""

import dataclasses
import heapq
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from densenet_jax.run.evaluate import predict_batches
from densenet_jax.scores.calibration import Reliability
from densenet_jax.scores.classes import ClassScores
from densenet_jax.training.eval_step import PredictStep

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A wrong prediction."""

    image: np.ndarray  # uint8 [h, w, c] as given to the model; the center crop if there are several
    index: int  # position in the split
    label: int
    predicted: int
    confidence: float  # probability of `predicted`
    label_probability: float  # probability of `label`, the true class
    # float32 [h, w], class activation map of `predicted`; None if the step has none.
    activation_map: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Answers:
    """Predictions of a split, summed up."""

    pairs: dict[tuple[int, int], int]  # number of examples by (true class, predicted class)
    mistakes: tuple[Mistake, ...]  # the most confident ones in this process's share, most confident first
    reliability: Reliability = dataclasses.field(default_factory=Reliability)  # accuracy by confidence
    # int32 [2, n]: true and predicted class of each example in the order of the split, -1 where there is no right one.
    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0), np.int32))

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(self.pairs.values())

    @property
    def right(self) -> int:
        """Number of correct predictions."""
        return sum(count for (true, predicted), count in self.pairs.items() if true == predicted)

    def list_confused(self, most: int) -> list[tuple[int, int, int]]:
        """Returns the `most` frequent mistakes as (true class, predicted class, count); ties are in class order."""
        wrong = ((true, predicted, count) for (true, predicted), count in self.pairs.items() if true != predicted)
        return heapq.nsmallest(most, wrong, key=lambda entry: (-entry[2], entry[:2]))

    def class_total(self, true: int) -> int:
        """Counts the examples of one class."""
        return sum(count for (label, _), count in self.pairs.items() if label == true)

    def scores(self, num_classes: int) -> ClassScores:
        """Computes precision, recall and F1 of each class."""
        examples, predicted, right = np.zeros((3, num_classes), np.int64)
        for (true, answer), count in self.pairs.items():
            examples[true] += count
            predicted[answer] += count
            right[true] += count * (true == answer)
        return ClassScores.from_counts(examples, predicted, right)

    def matrix(self, num_classes: int) -> np.ndarray:
        """Returns the confusion matrix, int64 [k, k]: true classes in rows, predicted ones in columns."""
        counts = np.zeros((num_classes, num_classes), np.int64)
        for (true, predicted), count in self.pairs.items():
            counts[true, predicted] = count
        return counts


class Surest(Generic[T]):
    """Keeps the few most confident mistakes of a split; of equal ones the first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, T]] = []

    def wants(self, confidence: float, place: int) -> bool:
        """Returns whether a mistake at this place would be kept, so that others need not be made."""
        return len(self._heap) < self._most or (confidence, -place) > self._heap[0][:2]

    def keep(self, confidence: float, place: int, mistake: T) -> None:
        """Adds a mistake and drops the least confident one where there are too many."""
        heapq.heappush(self._heap, (confidence, -place, mistake))
        if len(self._heap) > self._most:
            heapq.heappop(self._heap)

    def best_first(self) -> tuple[T, ...]:
        """Returns the mistakes, most confident first."""
        return tuple(mistake for _, _, mistake in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))


def gather_answers(
    predict_step: PredictStep,
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    batch_count: int,
    most_mistakes: int = 12,
) -> Answers:
    """Predicts every example, keeping counts and a few images so that memory does not grow with the split.

    If an example has a set of right classes, any of them is correct; an empty set excludes the example.

    Args:
        predict_step: jitted result of `make_predict_step` with replicated outputs, which may also have "map", float32
            [b, h, w], for the mistakes.
        variables: {"params", "batch_stats"}.
        batches: this process's shares of padded and masked global batches, in the order of the split.
    """
    pairs: dict[tuple[int, int], int] = {}
    surest: Surest[Mistake] = Surest(most_mistakes)
    reliability, rows = Reliability(), [np.zeros((2, 0), np.int32)]
    predictions = predict_batches(predict_step, variables, batches, mesh, batch_count)
    for number, (batch, answers) in enumerate(predictions):
        labels, predicted, counted = _judge(answers)
        _count(pairs, labels[counted], predicted[counted])
        rows.append(np.where(counted, np.stack([labels, predicted]), -1)[:, answers["mask"]].astype(np.int32))
        reliability.add(answers["probability"].max(axis=-1)[counted], (labels == predicted)[counted])
        for row, image in own_images(counted & (labels != predicted), batch):
            place, confidence = number * len(labels) + row, float(answers["probability"][row, predicted[row]])
            if surest.wants(confidence, place):
                of_row = {name: array[row] for name, array in answers.items()}
                surest.keep(confidence, place, _make_mistake(image.copy(), place, of_row, labels[row]))
    return Answers(pairs, surest.best_first(), reliability, np.concatenate(rows, axis=1))


def own_images(chosen: np.ndarray, batch: dict[str, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the chosen rows of a global batch that are in this process's share, with their images [h, w, c].

    Of several crops the image is the center one. It is a view, which keeps the whole batch in memory.
    """
    first = jax.process_index() * len(batch["label"])
    for row in np.flatnonzero(chosen[first : first + len(batch["label"])]).tolist():
        image = batch["image"][row]
        yield first + row, image if image.ndim == 3 else image[-1]


def _judge(answers: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns true class, predicted class and whether the example counts, for each row of a global batch."""
    probabilities, labels, counted = answers["probability"], answers["label"], answers["mask"]
    predicted = np.argmax(probabilities, axis=-1)
    if "label_set" in answers:
        right = answers["label_set"]
        counted = counted & right.any(axis=-1)
        labels = np.argmax(np.where(right, probabilities, -1.0), axis=-1)
    return labels, predicted, counted


def _count(pairs: dict[tuple[int, int], int], labels: np.ndarray, predicted: np.ndarray) -> None:
    distinct, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    for true, answer, count in zip(*distinct.tolist(), counts.tolist(), strict=True):
        pairs[true, answer] = pairs.get((true, answer), 0) + count


def _make_mistake(image: np.ndarray, place: int, answer: dict[str, np.ndarray], label: np.integer) -> Mistake:
    probabilities = answer["probability"]
    predicted = int(np.argmax(probabilities))
    return Mistake(
        image=image,
        index=place,
        label=int(label),
        predicted=predicted,
        confidence=float(probabilities[predicted]),
        label_probability=float(probabilities[label]),
        activation_map=answer["map"].copy() if "map" in answer else None,
    )
