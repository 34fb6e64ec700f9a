"""Scores of several labels an example: AUROC, average precision, F1, sensitivity and specificity."""

import math
from typing import NamedTuple

import numpy as np

from densenet_jax.scores import ranking

SPECIFICITY = 0.95  # at which "sensitivity_at_specificity" is measured


class LabelScores(NamedTuple):
    """Counts and scores of each label; a label with one kind of example only has NaN for every score."""

    positives: np.ndarray  # int64 [k]
    negatives: np.ndarray  # int64 [k]
    unknown: np.ndarray  # int64 [k]
    auroc: np.ndarray  # float64 [k], as the other scores
    average_precision: np.ndarray
    f1: np.ndarray  # at the threshold, as are the two that follow
    sensitivity: np.ndarray
    specificity: np.ndarray
    sensitivity_at_specificity: np.ndarray  # at the best threshold with specificity `SPECIFICITY`

    @property
    def is_scored(self) -> np.ndarray:
        """Whether a label has both kinds of examples, bool [k]."""
        return (self.positives > 0) & (self.negatives > 0)

    def means(self) -> dict[str, float]:
        """Returns the mean of every score over the labels with both kinds of examples; NaN if one is or without any."""
        chosen = self.is_scored
        return {name: float(getattr(self, name)[chosen].mean()) if chosen.any() else math.nan for name in SCORES}


SCORES = LabelScores._fields[3:]


def score_labels(
    scores: np.ndarray, targets: np.ndarray, thresholds: np.ndarray | float = 0.0, *, specificity: float = SPECIFICITY
) -> LabelScores:
    """Scores every label over all examples with a known target.

    Args:
        scores: float [n, k], logits or probabilities; a NaN makes its label's scores NaN.
        targets: float [n, k]: 1, 0, or NaN for unknown.
        thresholds: [k] or one, in the unit of `scores`; from it on a label is predicted.
        specificity: for `sensitivity_at_specificity`.
    """
    known, positive = ~np.isnan(targets), targets > 0
    positives, negatives = positive.sum(axis=0), (known & ~positive).sum(axis=0)
    predicted = scores >= thresholds
    at_threshold = threshold_scores(
        (predicted & positive).sum(axis=0), (predicted & known & ~positive).sum(axis=0), positives, negatives
    )
    ranked = [ranking.rank_label(scores[:, label], targets[:, label]) for label in range(scores.shape[1])]
    curves = [ranking.count_curve(each) for each in ranked]
    columns = {
        "auroc": np.array([ranking.auroc(curve) for curve in curves]),
        "average_precision": np.array([ranking.average_precision(curve) for curve in curves]),
        **at_threshold,
        "sensitivity_at_specificity": np.array([ranking.sensitivity_at(curve, specificity) for curve in curves]),
    }
    broken = np.any(np.isnan(scores) & known, axis=0)
    columns = {name: np.where(broken, np.nan, column) for name, column in columns.items()}
    return LabelScores(positives, negatives, (~known).sum(axis=0), **columns)


def threshold_scores(
    true_positives: np.ndarray, false_positives: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> dict[str, np.ndarray]:
    """Computes F1, sensitivity and specificity from counts [..., k]; NaN where one kind of example is missing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.where((positives > 0) & (negatives > 0), 1.0, np.nan)
        return {
            "f1": both * (2 * true_positives / (true_positives + false_positives + positives)),
            "sensitivity": both * (true_positives / positives),
            "specificity": both * (1 - false_positives / negatives),
        }
