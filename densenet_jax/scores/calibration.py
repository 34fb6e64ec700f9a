"""Calibration: temperatures and thresholds fitted on held-out examples, and how far probabilities can be trusted."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit, log_softmax, softmax

from densenet_jax.scores import ranking

BINS = 15
LIMITS = (0.02, 50.0)  # of a temperature; examples that are all right would have it fall to 0


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probability of each label, float64 [n, k]."""
    return expit(np.asarray(logits, np.float64))


def softmax_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy of class numbers int [n], in nats."""
    return -float(np.mean(log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(len(labels)), labels]))


def sigmoid_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean binary cross entropy over the targets that are 1 or 0, not NaN, in nats; NaN without any."""
    known = ~np.isnan(targets)
    if not known.any():
        return float("nan")
    signed = np.where(targets > 0, -1.0, 1.0) * np.asarray(logits, np.float64)
    return float(np.mean(np.logaddexp(0, signed)[known]))


def fit_softmax_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fits the temperature that minimizes the cross entropy of softmax(logits [n, k] / temperature) for labels [n].

    See arXiv:1706.04599.
    """
    logits = np.asarray(logits, np.float64)
    return _minimize(lambda temperature: softmax_loss(logits / temperature, labels))


def fit_sigmoid_temperatures(logits: np.ndarray, targets: np.ndarray, *, each_label: bool = False) -> np.ndarray:
    """Fits one temperature for all labels, or one a label, by the cross entropy of sigmoid(logits / temperature).

    `logits` and `targets` (1, 0, or NaN for unknown) are float [n, k], the result is float64 [k]. A label with one kind
    of example only would get a temperature of almost 0, and gets 1.
    """
    logits = np.asarray(logits, np.float64)
    both = np.any(targets > 0, axis=0) & np.any(targets == 0, axis=0)
    temperatures = np.ones(logits.shape[1])
    for chosen in [[label] for label in np.flatnonzero(both)] if each_label else [np.flatnonzero(both)]:
        if len(chosen):
            own, known = logits[:, chosen], targets[:, chosen]
            temperatures[chosen] = _minimize(_scaled_loss(own, known))
    return temperatures if each_label else np.full_like(temperatures, temperatures[both][0] if both.any() else 1.0)


def fit_thresholds(scores: np.ndarray, targets: np.ndarray, specificity: float = 0.0) -> np.ndarray:
    """Fits a threshold a label: with the best F1, or where given, the lowest with at least this specificity.

    Returns:
        float64 [k] in the unit of `scores`; NaN for a label with one kind of example only.
    """
    ranked = [ranking.rank_label(scores[:, label], targets[:, label]) for label in range(scores.shape[1])]
    if specificity:
        return np.array([ranking.specific_threshold(each, specificity) for each in ranked])
    return np.array([ranking.best_f1_threshold(each) for each in ranked])


def _scaled_loss(logits: np.ndarray, targets: np.ndarray) -> Callable[[np.floating], float]:
    return lambda temperature: sigmoid_loss(logits / temperature, targets)


def _minimize(loss: Callable[[np.floating], float]) -> float:
    limits = tuple(np.log(LIMITS))
    from scipy.optimize import minimize_scalar  # not at the top: every report imports this module

    result = minimize_scalar(lambda log: loss(np.exp(log)), bounds=limits, method="bounded", options={"xatol": 1e-7})
    return float(np.exp(result.x))


class Reliability:
    """Counts predictions in bins of equal width by their probability."""

    def __init__(self, bins: int = BINS) -> None:
        self.counts = np.zeros(bins, np.int64)
        self.right = np.zeros(bins, np.int64)  # those among them that came true
        self.confidence = np.zeros(bins)  # sum of their probabilities

    def add(self, confidence: np.ndarray, right: np.ndarray) -> None:
        """Adds predictions: probabilities float [n], and whether they came true, bool [n]."""
        bins = len(self.counts)
        places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        self.counts += np.bincount(places, minlength=bins)
        self.right += np.bincount(places[right], minlength=bins)
        self.confidence += np.bincount(places, weights=confidence, minlength=bins)

    def to_dict(self) -> dict[str, list]:
        """Returns the counts as plain lists, for a file."""
        return {"counts": self.counts.tolist(), "right": self.right.tolist(), "confidence": self.confidence.tolist()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Sequence[float]]) -> "Reliability":
        """Returns what `to_dict` has written."""
        made = cls(len(content["counts"]))
        made.counts, made.right = np.asarray(content["counts"]), np.asarray(content["right"])
        made.confidence = np.asarray(content["confidence"], np.float64)
        return made

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance between probability and share that came true (ECE, arXiv:1706.04599); NaN without any."""
        if not self.counts.any():
            return float("nan")
        return float(np.abs(self.right - self.confidence).sum() / self.counts.sum())


class Trust(NamedTuple):
    """How far probabilities can be trusted: all three are 0 for a perfect model."""

    ece: float
    brier: float
    loss: float


def trust_classes(logits: np.ndarray, labels: np.ndarray) -> tuple[Trust, Reliability]:
    """Judges softmax(logits [n, k]) of class numbers int [n]: ECE of the predicted class, Brier score over all."""
    probabilities = softmax(np.asarray(logits, np.float64), axis=-1)
    predicted = np.argmax(logits, axis=-1)
    reliability = Reliability()
    reliability.add(probabilities[np.arange(len(labels)), predicted], predicted == labels)
    brier = np.sum(probabilities**2, axis=-1) - 2 * probabilities[np.arange(len(labels)), labels] + 1
    return Trust(
        reliability.expected_calibration_error, float(np.mean(brier)), softmax_loss(logits, labels)
    ), reliability


def trust_labels(logits: np.ndarray, targets: np.ndarray) -> tuple[Trust, Reliability]:
    """Judges sigmoid(logits [n, k]) of known targets: means over the labels with both kinds of examples.

    The reliability is over the known targets of all labels together.
    """
    probabilities, known = sigmoid(logits), ~np.isnan(targets)
    together = Reliability()
    together.add(probabilities[known], targets[known] > 0)
    parts = []
    for label in np.flatnonzero(np.any(targets > 0, axis=0) & np.any(targets == 0, axis=0)):
        chosen = known[:, label]
        own, true = probabilities[chosen, label], targets[chosen, label]
        reliability = Reliability()
        reliability.add(own, true > 0)
        parts.append((reliability.expected_calibration_error, np.mean((own - true) ** 2)))
    ece, brier = np.mean(parts, axis=0).tolist() if parts else (float("nan"),) * 2
    return Trust(ece, brier, sigmoid_loss(logits, targets)), together
