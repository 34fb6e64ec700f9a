"""The report's part about many labels an image: predictions of a split, scores of each label, and mistakes."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from densenet_jax.predict.calibration import Calibration
from densenet_jax.report.gather import Surest, own_images
from densenet_jax.run.evaluate import predict_batches
from densenet_jax.scores.bootstrap import DRAWS, Intervals, label_intervals
from densenet_jax.scores.calibration import Reliability, Trust, sigmoid, trust_labels
from densenet_jax.scores.labels import SCORES, LabelScores, score_labels
from densenet_jax.training.eval_step import PredictStep

_MOST_WORK = 4e9  # examples times labels times draws
_COLUMNS = ("auroc", "average_precision", "f1", "sensitivity", "specificity")


@dataclasses.dataclass(frozen=True)
class LabelMistake:
    """An image and the label that the model is most wrong about."""

    image: np.ndarray  # uint8 or uint16 [h, w, c] as given to the model; the center crop if there are several
    index: int  # position in the split
    label: int
    present: bool  # what is true
    logit: float
    activation_map: np.ndarray  # float32 [h, w], of the label


@dataclasses.dataclass(frozen=True)
class LabelAnswers:
    """Predictions of a split."""

    logits: np.ndarray  # float [n, k], before any calibration
    targets: np.ndarray  # float [n, k]: 1, 0, or NaN for unknown
    mistakes: tuple[LabelMistake, ...]  # the most confident ones in this process's share, most confident first


def gather_label_answers(
    step: PredictStep,
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    batch_count: int,
    most_mistakes: int = 12,
) -> LabelAnswers:
    """Predicts every example, keeping its logits and the images of a few mistakes.

    Args:
        step: jitted with replicated outputs: "logit", "label", "mask", and "worst" int [b] and "map" float32 [b, h, w],
            the label with the largest error and its activation map.
        batches: this process's shares of padded and masked global batches, in the order of the split.
    """
    surest: Surest[LabelMistake] = Surest(most_mistakes)
    logits, targets = [], []
    predictions = predict_batches(step, variables, batches, mesh, batch_count)
    for number, (batch, answers) in enumerate(predictions):
        rows, worst = np.arange(len(answers["mask"])), answers["worst"]
        own, true = answers["logit"][rows, worst], answers["label"][rows, worst]
        wrong = answers["mask"] & ~np.isnan(true) & ((own >= 0) != (true > 0))
        for row, image in own_images(wrong, batch):
            place, logit, evidence = number * len(rows) + row, float(own[row]), answers["map"][row]
            if surest.wants(abs(logit), place):
                mistake = LabelMistake(image.copy(), place, int(worst[row]), true[row] > 0, logit, evidence.copy())
                surest.keep(abs(logit), place, mistake)
        logits.append(answers["logit"][answers["mask"]])
        targets.append(answers["label"][answers["mask"]])
    return LabelAnswers(np.concatenate(logits), np.concatenate(targets), surest.best_first())


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
        return cls(
            names=tuple(names),
            scores=score_labels(logits, answers.targets, limits),
            intervals=label_intervals(logits, answers.targets, limits, groups=groups, draws=draws),
            thresholds=thresholds,
            trust=trust,
            reliability=reliability,
            draws=draws,
            grouped=groups is not None,
        )

    def page_rows(self, none: str) -> list[tuple[str, ...]]:
        """Returns a row a label, the lowest AUROC first, and a last one of the means; `none` stands for no figure."""
        means = self.scores.means()
        order = np.argsort(np.nan_to_num(self.scores.auroc, nan=np.inf), kind="stable")
        last = ("mean", *(self._shown(means[name], name, -1, none) for name in _COLUMNS), "", "", "", "")
        return [
            *(
                (
                    self.names[label],
                    *(self._shown(getattr(self.scores, name)[label], name, label, none) for name in _COLUMNS),
                    f"{self.thresholds[label]:.3f}",
                    *(f"{counts[label]:,}" for counts in self.scores[:3]),
                )
                for label in order
            ),
            last,
        ]

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

    def _shown(self, value: float, name: str, label: int, none: str) -> str:
        if np.isnan(value):
            return none
        low, high = self.intervals[name][label]
        return f"{value:.3f}" if np.isnan(low) else f"{value:.3f} ({low:.2f}–{high:.2f})"


def describe_mistake(mistake: LabelMistake, names: Sequence[str], calibration: Calibration | None) -> tuple[str, str]:
    """Returns a heading for a mistake, and how sure the model was."""
    temperature = 1.0
    if calibration is not None:
        temperature = calibration.temperatures[mistake.label % len(calibration.temperatures)]
    chance = float(sigmoid(np.asarray(mistake.logit / temperature)))
    name = names[mistake.label]
    return (f"{name} missed" if mistake.present else f"{name} though there is none"), f"{chance:.1%} for {name}."


def _cell(value: float) -> object:
    return "" if np.isnan(value) else round(float(value), 6)
