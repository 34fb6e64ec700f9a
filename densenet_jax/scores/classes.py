"""Scores of one class an example, from counts of examples by true and predicted class."""

from typing import NamedTuple

import numpy as np


class ClassScores(NamedTuple):
    """Counts and scores of each class; a score without examples or predictions to judge by is NaN."""

    examples: np.ndarray  # int64 [k]
    right: np.ndarray  # int64 [k], examples predicted correctly
    precision: np.ndarray  # float64 [k], share of the predictions of a class that are right
    recall: np.ndarray  # float64 [k], share of the examples of a class that are found, the accuracy of the class
    f1: np.ndarray  # float64 [k], harmonic mean of precision and recall

    @classmethod
    def from_counts(cls, examples: np.ndarray, predicted: np.ndarray, right: np.ndarray) -> "ClassScores":
        """Computes the scores from int [..., k] counts of examples, of predictions and of those that are both."""
        with np.errstate(invalid="ignore"):
            return cls(examples, right, right / predicted, right / examples, 2 * right / (examples + predicted))

    @classmethod
    def from_confusion(cls, counts: np.ndarray) -> "ClassScores":
        """Computes the scores from counts int [k, k], true classes in rows, predicted ones in columns."""
        return cls.from_counts(counts.sum(axis=1), counts.sum(axis=0), np.diag(counts))

    def means(self) -> dict[str, np.ndarray]:
        """Returns "top1", "balanced_accuracy" and "f1" [...].

        Balanced accuracy is the mean recall of the classes with examples, "f1" the mean over those that have examples
        or predictions.
        """
        with np.errstate(invalid="ignore"):
            top1 = self.right.sum(axis=-1) / self.examples.sum(axis=-1)
        return {"top1": top1, "balanced_accuracy": mean_known(self.recall), "f1": mean_known(self.f1)}


def mean_known(values: np.ndarray) -> np.ndarray:
    """Averages over the last axis what is not NaN; NaN where nothing is."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=-1) / np.count_nonzero(~np.isnan(values), axis=-1)
