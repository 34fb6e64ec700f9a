"""Exact scores of one label, with ties: every distinct score is a threshold, and examples may have weights."""

from typing import NamedTuple

import numpy as np


class Ranked(NamedTuple):
    """The known examples of one label, from the highest score to the lowest."""

    order: np.ndarray  # int64 [m], their positions among all examples
    positive: np.ndarray  # bool [m]
    starts: np.ndarray  # int64 [t], first place of each distinct score
    scores: np.ndarray  # [t], the distinct scores


def rank_label(scores: np.ndarray, targets: np.ndarray) -> Ranked:
    """Sorts the examples with a known target, float [n] of 1, 0, or NaN for unknown, by score, float [n].

    A higher score means more likely positive.
    """
    known = np.flatnonzero(~np.isnan(targets))
    order = known[np.argsort(-scores[known], kind="stable")]
    ordered = scores[order]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]]))
    return Ranked(order, targets[order] > 0, starts, ordered[starts])


class Curve(NamedTuple):
    """Positives and negatives with at least each distinct score, as sums of weights, [..., t]."""

    true_positives: np.ndarray
    false_positives: np.ndarray


def count_curve(ranked: Ranked, weights: np.ndarray | None = None) -> Curve:
    """Counts what each threshold predicts as positive.

    `weights` int [..., n] are of all examples, such as how often a bootstrap draw has each; None counts each once.
    """
    chosen = np.ones(len(ranked.order), np.int64) if weights is None else weights[..., ranked.order]
    if not len(ranked.starts):
        nothing = np.zeros((*chosen.shape[:-1], 1), np.int64)
        return Curve(nothing, nothing)
    everything = np.cumsum(np.add.reduceat(chosen, ranked.starts, axis=-1, dtype=np.int64), axis=-1)
    positives = np.add.reduceat(chosen * ranked.positive, ranked.starts, axis=-1, dtype=np.int64)
    true_positives = np.cumsum(positives, axis=-1)
    return Curve(true_positives, everything - true_positives)


def auroc(curve: Curve) -> np.ndarray:
    """Area under the ROC curve: the share of pairs that are ordered rightly, a tie counting half; NaN without pairs."""
    true, false = curve
    wins = np.sum(np.diff(false, axis=-1, prepend=0) * (2 * true - np.diff(true, axis=-1, prepend=0)), axis=-1)
    return _divide(wins, 2 * true[..., -1] * false[..., -1])


def average_precision(curve: Curve) -> np.ndarray:
    """Mean precision at each step of recall, without interpolation; NaN without pairs, as for `auroc`."""
    true, false = curve
    gains = np.diff(true, axis=-1, prepend=0)
    total = np.sum(gains * (true / np.maximum(true + false, 1)), axis=-1)
    return _divide(total, true[..., -1] * (false[..., -1] > 0))


def sensitivity_at(curve: Curve, specificity: float) -> np.ndarray:
    """Highest sensitivity of the thresholds that are at least this specific; NaN without pairs."""
    true, false = curve
    # Above the highest score nothing is predicted: specificity 1, sensitivity 0.
    reached = np.max(np.where(_is_specific(curve, specificity), true, 0), axis=-1)
    return _divide(reached, true[..., -1] * (false[..., -1] > 0))


def best_f1_threshold(ranked: Ranked) -> float:
    """Returns the threshold with the highest F1, the highest of equal ones; NaN without both kinds of examples."""
    true, false = curve = count_curve(ranked)
    if not true[-1] or not false[-1]:
        return float("nan")
    f1 = 2 * true / (true + false + curve.true_positives[-1])
    return _below(ranked, int(np.argmax(f1)))


def specific_threshold(ranked: Ranked, specificity: float) -> float:
    """Returns the lowest threshold that is at least this specific; NaN without both kinds of examples.

    It is infinite where even the highest score is not specific enough.
    """
    curve = count_curve(ranked)
    if not curve.true_positives[-1] or not curve.false_positives[-1]:
        return float("nan")
    allowed = np.flatnonzero(_is_specific(curve, specificity))
    return _below(ranked, int(allowed[-1])) if len(allowed) else float("inf")


def _below(ranked: Ranked, place: int) -> float:
    """Puts a threshold between two scores, so that rounding on another device moves no example across it."""
    here, following = ranked.scores[place], ranked.scores[place + 1 : place + 2]
    return float((np.float64(here) + following[0]) / 2) if len(following) else float(here)


def _is_specific(curve: Curve, specificity: float) -> np.ndarray:
    false = curve.false_positives
    return false <= (1 - specificity) * false[..., -1:] * (1 + 1e-12)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)
