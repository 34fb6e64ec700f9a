"""What a model answers to every example of a split: whom it mistakes for whom, and where it is surest of a mistake."""

import dataclasses
import heapq
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from densenet_jax.system.console import Bar
from densenet_jax.training.sharding import to_devices


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One wrong answer.

    Attributes:
        image: uint8 [h, w, c], what the model was given; of many crops the middle one.
        index: its place in the split.
        label: the true class.
        predicted: the class that the model gave.
        confidence: the probability that it gave to that class.
        label_probability: the probability that it gave to the true class.
    """

    image: np.ndarray
    index: int
    label: int
    predicted: int
    confidence: float
    label_probability: float


@dataclasses.dataclass(frozen=True)
class Answers:
    """All answers in short.

    Attributes:
        pairs: (true class, predicted class) -> how many examples.
        mistakes: the most confident ones of this process's share, the surest first.
    """

    pairs: dict[tuple[int, int], int]
    mistakes: tuple[Mistake, ...]

    @property
    def examples(self) -> int:
        """How many examples were answered."""
        return sum(self.pairs.values())

    @property
    def right(self) -> int:
        """How many answers are right."""
        return sum(count for (true, predicted), count in self.pairs.items() if true == predicted)

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The `most` frequent mistakes as (true class, predicted class, count), by class number where equal."""
        wrong = ((true, predicted, count) for (true, predicted), count in self.pairs.items() if true != predicted)
        return heapq.nsmallest(most, wrong, key=lambda entry: (-entry[2], entry[:2]))

    def class_total(self, true: int) -> int:
        """Examples of one class."""
        return sum(count for (label, _), count in self.pairs.items() if label == true)

    def matrix(self, num_classes: int) -> np.ndarray:
        """int64 [k, k]: true classes in rows, predicted ones in columns."""
        counts = np.zeros((num_classes, num_classes), np.int64)
        for (true, predicted), count in self.pairs.items():
            counts[true, predicted] = count
        return counts


def gather_answers(
    predict_step: Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]],
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    batch_count: int,
    most_mistakes: int = 12,
) -> Answers:
    """Asks the model about every example; keeps counts and a few images, so memory does not grow with the split.

    Args:
        predict_step: as `densenet_jax.training.predict_step.make_predict_step` builds it, jitted, its results on
            every device.
        variables: {"params", "batch_stats"}.
        batches: this process's shares of padded and masked global batches, in the order of the split.
        mesh: where they go.
        batch_count: how many batches there are, for the bar.
        most_mistakes: images kept at most.

    An answer to an example with a set of right classes is right if it is any of them; one whose set is empty is left
    out.
    """
    pairs: dict[tuple[int, int], int] = {}
    surest: list[tuple[float, int, Mistake]] = []
    bar = Bar("predicting", batch_count)
    try:
        for number, batch in enumerate(batches):
            answers = jax.device_get(predict_step(variables, to_devices(batch, mesh)))
            labels, predicted, counted = _judge(answers)
            _count(pairs, labels[counted], predicted[counted])
            wrong = np.flatnonzero(counted & (labels != predicted))
            share = len(batch["label"])
            first = jax.process_index() * share
            for row in wrong[(wrong >= first) & (wrong < first + share)].tolist():
                place, confidence = number * len(labels) + row, float(answers["probability"][row, predicted[row]])
                if len(surest) < most_mistakes or (confidence, -place) > surest[0][:2]:
                    found = _mistake(batch["image"][row - first], place, answers["probability"][row], labels[row])
                    heapq.heappush(surest, (confidence, -place, found))
                if len(surest) > most_mistakes:
                    heapq.heappop(surest)
            bar.advance()
    finally:
        bar.close()
    return Answers(pairs, tuple(mistake for _, _, mistake in sorted(surest, reverse=True)))


def _judge(answers: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The true class, the predicted one, and whether the example counts, of each row of a global batch."""
    probabilities, labels, counted = answers["probability"], answers["label"], answers["mask"]
    predicted = np.argmax(probabilities, axis=-1)
    if "label_set" in answers:
        right = answers["label_set"]
        counted = counted & right.any(axis=-1)
        labels = np.argmax(np.where(right, probabilities, -1.0), axis=-1)
    return labels, predicted, counted


def _count(pairs: dict[tuple[int, int], int], labels: np.ndarray, predicted: np.ndarray) -> None:
    found, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    for true, answer, count in zip(*found.tolist(), counts.tolist(), strict=True):
        pairs[true, answer] = pairs.get((true, answer), 0) + count


def _mistake(image: np.ndarray, place: int, probabilities: np.ndarray, label: np.integer) -> Mistake:
    predicted = int(np.argmax(probabilities))
    return Mistake(
        image=(image if image.ndim == 3 else image[-1]).copy(),  # else the whole batch would be kept with it
        index=place,
        label=int(label),
        predicted=predicted,
        confidence=float(probabilities[predicted]),
        label_probability=float(probabilities[label]),
    )
