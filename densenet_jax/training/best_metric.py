"""The validation metric that chooses the best checkpoint and stops training early."""

import math
from collections.abc import Mapping
from typing import Any

# Metrics by the labels of an image (config.data.labels), the usual one first, with their words.
BEST_METRICS: dict[str, dict[str, str]] = {
    "single": {
        "top1": "top-1",
        "top5": "top-5",
        "loss": "loss",
        "balanced_accuracy": "balanced accuracy",
        "f1": "F1",
    },
    "multi": {"auroc": "AUROC", "average_precision": "average precision", "f1": "F1", "loss": "loss"},
}
NEED_CONFUSION = ("balanced_accuracy", "f1")  # metrics of one class an image that counts by class give
METRIC_WORDS = {name: words for kind in BEST_METRICS.values() for name, words in kind.items()}
_PERCENT = ("top1", "top5", "balanced_accuracy")  # shown in percent, others with four digits


def score_figures(figures: Mapping[str, Any], metric: str = "") -> float:
    """Returns the chosen figure, more is better: the loss negated, and -inf where it is missing or not a number.

    Args:
        figures: of one validation.
        metric: one of `BEST_METRICS`; "" is the usual one for these figures.
    """
    metric = chosen_metric(figures, metric)
    value = figures.get(metric)
    if value is None or math.isnan(value):
        return -math.inf
    return -float(value) if metric == "loss" else float(value)


def describe_score(figures: Mapping[str, Any], metric: str = "") -> str:
    """Returns the figure that `score_figures` scores as text, such as "top-1 98.33%" or "AUROC 0.8412"."""
    metric, score = chosen_metric(figures, metric), score_figures(figures, metric)
    return f"{METRIC_WORDS[metric]} {show_score(score, metric)}"


def describe_figures(figures: Mapping[str, Any]) -> str:
    """Returns all figures of a validation as text, such as "loss 0.0612  top-1 98.33%  top-5 100.00%"."""
    return "  ".join(describe_score(figures, name) for name in figures if name in METRIC_WORDS)


def chosen_metric(figures: Mapping[str, Any], metric: str = "") -> str:
    """Returns `metric`, or the usual one for these figures."""
    return metric or ("top1" if "top1" in figures else "auroc")


def show_score(score: float, metric: str) -> str:
    """Formats the figure of a score: accuracies in percent, others with four digits."""
    value = -score if metric == "loss" else score
    if not math.isfinite(value):
        return "unknown"
    return f"{value:.2%}" if metric in _PERCENT else f"{value:.4f}"
