"""Charts and final figures from the metrics of one or several runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from densenet_jax.report.plots import Chart, Line
from densenet_jax.training.best_metric import METRIC_WORDS, chosen_metric, score_figures, show_score

Record = Mapping[str, Any]
NONE = "–"  # stands for a missing figure
_MANY = 30  # lines with at least this many values are drawn without markers


def run_charts(records: Sequence[Record], *, mixed: bool) -> list[Chart]:
    """Returns the charts of one run's metrics, without those that would be empty.

    If its training images are `mixed` (mixup, CutMix), training accuracy is not comparable, and the chart says so.
    """
    training = "training, mixed images" if mixed else "training"

    def both(key: str) -> tuple[Line, ...]:
        return (
            _line(records, "train", key, training, 0),
            _line(records, "validation", key, "validation", 1),
            _line(records, "validation", f"raw_{key}", "validation, raw weights", 2),
        )

    speed = _line(records, "train", "images_per_sec", "training", 0)
    waiting = _line(records, "train", "data_wait_fraction", "training", 0)
    rate = _line(records, "train", "learning_rate", "training", 0)
    return _with_values(
        Chart("loss", "Loss", "nats", both("loss"), logarithmic=True),
        Chart("top1", "Top-1 accuracy", "share of images", both("top1"), percent=True),
        Chart("auroc", "AUROC, mean over labels", "AUROC", both("auroc")),
        Chart("average_precision", "Average precision, mean over labels", "precision", both("average_precision")),
        Chart("f1", "F1, mean over labels or classes", "F1", both("f1")),
        Chart("learning_rate", "Learning rate", "learning rate", (rate,), y_from_zero=True),
        Chart("throughput", "Throughput", "images/s", (speed,), y_from_zero=True),
        Chart("data_wait", "Time spent waiting for data", "share of time", (waiting,), percent=True, y_from_zero=True),
    )


def compare_charts(runs: Mapping[str, Sequence[Record]]) -> list[Chart]:
    """Returns charts with one line a run, without those that would be empty."""

    def lines(split: str, key: str) -> tuple[Line, ...]:
        return tuple(_line(records, split, key, name, style) for style, (name, records) in enumerate(runs.items()))

    return _with_values(
        Chart(
            "compare_top1", "Validation top-1 accuracy", "share of images", lines("validation", "top1"), percent=True
        ),
        Chart("compare_auroc", "Validation AUROC", "mean over labels", lines("validation", "auroc")),
        Chart("compare_loss", "Validation loss", "nats", lines("validation", "loss"), logarithmic=True),
        Chart("compare_train_loss", "Training loss", "nats", lines("train", "loss"), logarithmic=True),
        Chart("compare_train_top1", "Training top-1 accuracy", "share of images", lines("train", "top1"), percent=True),
        Chart("compare_learning_rate", "Learning rate", "rate", lines("train", "learning_rate"), y_from_zero=True),
        Chart("compare_throughput", "Throughput", "images/s", lines("train", "images_per_sec"), y_from_zero=True),
    )


def final_figures(records: Sequence[Record], best_metric: str = "") -> list[tuple[str, str]]:
    """Returns (name, value) pairs that sum a run up; a missing value is `NONE`.

    `best_metric` is what the best validation is best in, see `densenet_jax.training.best_metric.score_figures`.
    """
    train = [record for record in records if record["split"] == "train"]
    validation = [record for record in records if record["split"] == "validation"]
    last: Record = validation[-1] if validation else {}
    best: Record = max(validation, key=lambda record: (score_figures(record, best_metric), record["step"]), default={})
    metric = chosen_metric(best, best_metric)
    best_figure = show_score(score_figures(best, metric), metric) if best else NONE
    # The first interval includes one-off costs, such as loading programs and filling caches.
    steady = train[1:] or train

    def shown(record: Record, key: str, form: Callable[[float], str]) -> str:
        return form(record[key]) if key in record else NONE

    def typical(key: str, form: Callable[[float], str]) -> str:
        return form(statistics.median(record[key] for record in steady)) if steady else NONE

    newest: Record = max((*train[-1:], *validation[-1:]), key=lambda record: record["step"], default={})
    return [
        ("epochs", shown(newest, "epoch", "{:.4g}".format)),
        ("steps", shown(newest, "step", "{:,}".format)),
        *((f"validation {METRIC_WORDS[name]}", shown(last, name, form)) for name, form in _scores_of(last)),
        ("validation loss", shown(last, "loss", "{:.4f}".format)),
        (f"best {METRIC_WORDS[metric] if best else 'top-1'}", best_figure),
        ("step of the best", shown(best, "step", "{:,}".format)),
        ("last training loss", shown(train[-1] if train else {}, "loss", "{:.4f}".format)),
        ("images/s, median", typical("images_per_sec", lambda rate: f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}")),
        ("waiting for data, median", typical("data_wait_fraction", "{:.1%}".format)),
    ]


def _scores_of(record: Record) -> list[tuple[str, Callable[[float], str]]]:
    """Returns the names of a validation's scores and how they are shown."""
    if "auroc" in record:
        return [(name, "{:.4f}".format) for name in ("auroc", "average_precision", "f1")]
    return [(name, "{:.2%}".format) for name in ("top1", "top5")]


def _line(records: Sequence[Record], split: str, key: str, label: str, style: int) -> Line:
    chosen = [record for record in records if record["split"] == split and key in record]
    epochs, values = ([record[name] for record in chosen] for name in ("epoch", key))
    return Line(label, epochs, values, marked=len(chosen) < _MANY and split == "validation", style=style)


def _with_values(*charts: Chart) -> list[Chart]:
    return [chart for chart in charts if any(len(line.xs) for line in chart.lines)]
