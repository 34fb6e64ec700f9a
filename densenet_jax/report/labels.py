"""Table of the scores of each label, for the page and as CSV."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from densenet_jax.predict.calibration import Calibration
from densenet_jax.report.curves import NONE
from densenet_jax.report.gather import LabelAnswers
from densenet_jax.scores.bootstrap import DRAWS, Intervals, label_intervals
from densenet_jax.scores.calibration import Reliability, Trust, trust_labels
from densenet_jax.scores.labels import SCORES, LabelScores, score_labels

_MOST_WORK = 4e9  # examples times labels times draws
_COLUMNS = ("auroc", "average_precision", "f1", "sensitivity", "specificity")


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """Scores of each label at its threshold, with intervals of 95%."""

    names: tuple[str, ...]
    scores: LabelScores
    intervals: Intervals
    thresholds: np.ndarray  # float64 [k], of probabilities
    trust: Trust
    reliability: Reliability
    draws: int
    grouped: bool  # whether whole groups were drawn

    @classmethod
    def from_answers(
        cls, answers: LabelAnswers, names: Sequence[str], groups: np.ndarray | None, calibration: Calibration | None
    ) -> "LabelTable":
        """Scores the answers, after the calibration if there is one; thresholds are 0.5 where it has none."""
        logits, thresholds = np.asarray(answers.logits, np.float64), np.full(len(names), np.nan)
        if calibration is not None:
            logits = logits / np.asarray(calibration.temperatures)
            thresholds = np.asarray(calibration.thresholds or thresholds, np.float64)
        thresholds = np.where(np.isnan(thresholds), 0.5, thresholds)
        with np.errstate(divide="ignore"):
            limits = np.log(thresholds) - np.log1p(-thresholds)
        draws = int(np.clip(_MOST_WORK / max(1, logits.size), 100, DRAWS))
        trust, reliability = trust_labels(logits, answers.targets)
        scores = score_labels(logits, answers.targets, limits)
        intervals = label_intervals(logits, answers.targets, limits, groups=groups, draws=draws)
        return cls(tuple(names), scores, intervals, thresholds, trust, reliability, draws, groups is not None)

    def page_rows(self) -> list[tuple[str, ...]]:
        """Returns a row of the means and one a label, the lowest AUROC first."""
        means, scores = self.scores.means(), self.scores
        rows = [("mean", *(self._shown(means[name], name, -1) for name in _COLUMNS), "", "", "", "")]
        for label in np.argsort(np.nan_to_num(scores.auroc, nan=np.inf), kind="stable"):
            shown = (self._shown(getattr(scores, name)[label], name, label) for name in _COLUMNS)
            counts = (f"{counts[label]:,}" for counts in scores[:3])
            rows.append((self.names[label], *shown, f"{self.thresholds[label]:.3f}", *counts))
        return rows

    def csv_rows(self) -> Iterable[list[object]]:
        """Yields a heading, a row a label and one of the means; what has no figure is an empty cell."""
        limits = [f"{name}_{end}" for name in _COLUMNS for end in ("low", "high")]
        yield ["label_id", "label", "positives", "negatives", "unknown", "threshold", *SCORES, *limits]
        for label, name in enumerate(self.names):
            counts = [int(each[label]) for each in self.scores[:3]]
            scores = [getattr(self.scores, score)[label] for score in SCORES]
            cells = [self.thresholds[label], *scores, *self._limits(label)]
            yield [label, name, *counts, *map(_cell, cells)]
        yield ["", "mean", "", "", "", "", *map(_cell, (*self.scores.means().values(), *self._limits(-1)))]

    def _limits(self, label: int) -> list[float]:
        return [self.intervals[name][label, end] for name in _COLUMNS for end in (0, 1)]

    def _shown(self, value: float, name: str, label: int) -> str:
        if np.isnan(value):
            return NONE
        low, high = self.intervals[name][label]
        return f"{value:.3f}" if np.isnan(low) else f"{value:.3f} ({low:.2f}–{high:.2f})"


def _cell(value: float) -> object:
    return "" if np.isnan(value) else round(float(value), 6)
