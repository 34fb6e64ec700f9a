"""Calibration of a classifier: how often it is right at each confidence."""

import numpy as np


class Reliability:
    """Counts predictions in bins of equal width by their confidence.

    Attributes:
        counts: int64 [bins], predictions in each bin.
        right: int64 [bins], correct ones among them.
        confidence: float64 [bins], sum of their confidences.
    """

    def __init__(self, bins: int = 15) -> None:
        self.counts, self.right = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self.confidence = np.zeros(bins)

    def add(self, confidence: np.ndarray, right: np.ndarray) -> None:
        """Adds predictions: confidence float [n] of the predicted classes, and whether they are right, bool [n]."""
        bins = len(self.counts)
        places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        self.counts += np.bincount(places, minlength=bins)
        self.right += np.bincount(places[right], minlength=bins)
        self.confidence += np.bincount(places, weights=confidence, minlength=bins)

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance between confidence and accuracy (ECE, arXiv:1706.04599), NaN without predictions."""
        if not self.counts.any():
            return float("nan")
        return float(np.abs(self.right - self.confidence).sum() / self.counts.sum())
