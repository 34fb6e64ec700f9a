"""The metric that the best checkpoint is best in."""

import math

import pytest

from densenet_jax.training.best_metric import describe_figures, describe_score, score_figures


@pytest.mark.parametrize(
    ("figures", "metric", "score"),
    [
        ({"top1": 0.5, "loss": 2.0}, "", 0.5),
        ({"top1": 0.5, "loss": 2.0}, "loss", -2.0),
        ({"auroc": 0.8, "loss": 2.0}, "", 0.8),
        ({"auroc": math.nan}, "", -math.inf),
        ({"auroc": None}, "auroc", -math.inf),
        ({"top1": 0.5}, "balanced_accuracy", -math.inf),
    ],
)
def test_more_is_better_and_what_is_missing_is_worst(figures, metric, score):
    assert score_figures(figures, metric) == score


def test_figures_as_text():
    figures = {"step": 3, "examples": 9, "loss": 0.25, "auroc": 0.75, "average_precision": math.nan, "labels": 1}
    assert describe_figures(figures) == "loss 0.2500  AUROC 0.7500  average precision unknown"
    assert describe_score({"loss": 0.25, "top1": 1.0}) == "top-1 100.00%"
    assert describe_score({"loss": 0.25}, "loss") == "loss 0.2500"
