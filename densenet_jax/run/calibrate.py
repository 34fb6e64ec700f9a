"""Fits temperatures and thresholds to a checkpoint on the evaluated split."""

import dataclasses
from typing import Any

import numpy as np

from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.run.evaluate import gather_rows
from densenet_jax.scores import calibration
from densenet_jax.scores.calibration import Reliability, Trust


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fitted temperatures and thresholds, and how far the probabilities can be trusted without and with them."""

    temperatures: np.ndarray  # float64 [1], or [k] for many labels
    thresholds: np.ndarray  # float64 [k] of calibrated probabilities, NaN where unknown; [0] for one class an image
    examples: int
    before: Trust
    after: Trust
    reliability: tuple[Reliability, Reliability]  # before and after


def fit_calibration(
    logits: np.ndarray, labels: np.ndarray, *, each_label: bool = False, specificity: float = 0.0
) -> Fit:
    """Fits one temperature for classes; for many labels one or one a label, and a threshold a label.

    Args:
        logits: float [n, k].
        labels: int [n], or float [n, k] with 1, 0 and NaN for unknown.
        each_label: whether each label has a temperature of its own.
        specificity: that every threshold must reach; 0 maximizes F1 instead.
    """
    many = labels.ndim == 2
    temperatures, thresholds = np.empty(0), np.empty(0)
    if many:
        temperatures = calibration.fit_sigmoid_temperatures(logits, labels, each_label=each_label)
        chances = calibration.sigmoid(logits / temperatures)
        thresholds = calibration.fit_thresholds(chances, labels, specificity)
        thresholds = np.minimum(thresholds, 1.0)  # where no threshold is specific enough, nothing is predicted below 1
    else:
        temperatures = np.array([calibration.fit_softmax_temperature(logits, labels)])
    judge = calibration.trust_labels if many else calibration.trust_classes
    (before, plain), (after, fitted) = judge(logits, labels), judge(logits / temperatures, labels)
    return Fit(temperatures, thresholds, len(logits), before, after, (plain, fitted))


def calibrate(
    experiment: Experiment, variables: dict[str, Any], *, each_label: bool = False, specificity: float = 0.0
) -> Fit:
    """Predicts the evaluated split and fits to it, the same on all processes.

    Raises:
        UserError: the options or the data set don't fit.
    """
    data, many = experiment.data, experiment.many_labels
    if data.eval_source.label_sets:
        raise UserError(
            f"--mode calibrate expects one class an image or many labels, but {experiment.config.data.name} has a set "
            "of right classes an image; take another data set."
        )
    if not many and (each_label or specificity):
        flag = "--each_label" if each_label else f"--specificity {specificity:g}"
        raise UserError(f"{flag} is for many labels, but config.data.labels is 'single'; leave it out.")
    step = experiment.compile_logits_step()
    with data.eval_batches() as batches:
        rows = gather_rows(
            step, variables, batches, experiment.mesh, examples=len(data.eval_source), batch_count=data.eval_batch_count
        )
    if np.isnan(rows["logit"]).any():
        raise UserError("the model's logits are not numbers (NaN), so nothing can be fitted; take another checkpoint.")
    if many and not np.any((rows["label"] > 0).any(axis=0) & (rows["label"] == 0).any(axis=0)):
        raise UserError(
            f"no label of {experiment.config.data.name} {data.eval_split} has both kinds of examples, so nothing can "
            "be fitted; name another config.data.eval_split."
        )
    return fit_calibration(rows["logit"], rows["label"], each_label=each_label, specificity=specificity)
