"""Collects what a run's page shows beyond its metrics: predictions, mistakes, augmented images."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.errors import UserError
from densenet_jax.experiment import AugmentedSamples, Experiment, augmented_samples
from densenet_jax.experiment.augmentation import normalize_with
from densenet_jax.predict.calibration import Calibration, read_calibration
from densenet_jax.predict.explain import activation_maps
from densenet_jax.report.gather import Answers, gather_answers
from densenet_jax.report.labels import LabelAnswers, LabelTable, gather_label_answers
from densenet_jax.scores.bootstrap import Intervals, class_intervals
from densenet_jax.scores.classes import ClassScores
from densenet_jax.training.eval_step import PredictStep
from densenet_jax.training.sharding import replicated
from densenet_jax.training.timeline import Timeline

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Look:
    """Results of the model and samples of the data; what is None could not be had."""

    step: int | None = None  # checkpoint that was used
    answers: Answers | None = None  # predictions of the evaluated split
    names: tuple[str, ...] = ()  # image of each mistake
    class_names: tuple[str, ...] = ()
    samples: AugmentedSamples | None = None
    timeline: Timeline | None = None
    missing: tuple[str, ...] = ()  # reasons for what is None, in sentences
    label_answers: LabelAnswers | None = None  # those of many labels, instead of `answers`
    label_table: LabelTable | None = None
    calibration: Calibration | None = None  # of this checkpoint
    groups: np.ndarray | None = None  # of the evaluated images, such as patients

    def scores(self) -> ClassScores:
        """Computes precision, recall and F1 of each class; needs `answers`."""
        assert self.answers is not None
        return self.answers.scores(len(self.class_names))

    def intervals(self) -> Intervals:
        """Computes bootstrap intervals of accuracy, balanced accuracy and F1; needs `answers`."""
        assert self.answers is not None
        if self.groups is None:
            pairs = np.array(list(self.answers.pairs), np.int64).reshape(-1, 2)
            true, predicted = np.repeat(pairs, list(self.answers.pairs.values()), axis=0).T
            return class_intervals(true, predicted, len(self.class_names))
        counted = self.answers.rows[0] >= 0
        true, predicted = self.answers.rows[:, counted]
        return class_intervals(true, predicted, len(self.class_names), groups=self.groups[counted])


def look_at(experiment: Experiment, workdir: str) -> Look:
    """Predicts the evaluated split with the saved model and augments some training images."""
    look, missing = Look(), []
    try:
        look = dataclasses.replace(look, samples=augmented_samples(experiment), timeline=experiment.timeline)
    except UserError as error:
        missing.append(f"No augmented training images: {error}")
    try:
        step, variables = experiment.saved_variables(workdir)
        data = experiment.data
        many, source = experiment.many_labels, data.eval_source
        explaining = compile_label_step(experiment) if many else compile_explaining_step(experiment)
        calibration = read_calibration(workdir, step, source.num_classes)
        with data.eval_batches() as batches:
            gather: Any = gather_label_answers if many else gather_answers
            answers = gather(explaining, variables, batches, experiment.mesh, batch_count=data.eval_batch_count)
        look = dataclasses.replace(
            look,
            step=step,
            calibration=calibration,
            groups=source.groups(),
            names=tuple(source[mistake.index].name for mistake in answers.mistakes),
            class_names=tuple(source.class_names),
            **{"label_answers" if many else "answers": answers},
        )
        if many and jax.process_index() == 0:
            table = LabelTable.from_answers(answers, source.class_names, source.groups(), calibration)
            look = dataclasses.replace(look, label_table=table)
    except UserError as error:
        missing.append(f"No predictions: {error}")
    for why in missing:
        logger.warning("%s", why)
    return dataclasses.replace(look, missing=tuple(missing))


def compile_explaining_step(
    experiment: Experiment,
) -> PredictStep:
    """Extends the prediction step by "map" float32 [b, h, w], the class activation map of the predicted class.

    With ten-crop evaluation it is that of the center crop.
    """
    predict_step = experiment.compile_predict_step()
    normalize = normalize_with(experiment.data.mean_std(), experiment.policy.compute_dtype)

    def step(variables: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        answers = predict_step(variables, batch)
        images = batch["image"] if batch["image"].ndim == 4 else batch["image"][:, -1]
        predicted = jnp.argmax(answers["probability"], axis=-1)
        maps = activation_maps(experiment.model, variables, normalize(images), predicted)
        return {**answers, "map": maps.astype(jnp.float32)}

    return jax.jit(step, out_shardings=replicated(experiment.mesh))


def compile_label_step(
    experiment: Experiment,
) -> PredictStep:
    """Extends the step of logits by "worst" int [b], each image's label with the largest error, and its "map"."""
    logits_step = experiment.compile_logits_step()
    normalize = normalize_with(experiment.data.mean_std(), experiment.policy.compute_dtype)

    def step(variables: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = logits_step(variables, batch)
        images = batch["image"] if batch["image"].ndim == 4 else batch["image"][:, -1]
        errors = jnp.where(rows["label"] > 0, -rows["logit"], rows["logit"])
        worst = jnp.argmax(jnp.where(jnp.isnan(rows["label"]), -jnp.inf, errors), axis=-1)
        maps = activation_maps(experiment.model, variables, normalize(images), worst)
        return {**rows, "worst": worst, "map": maps.astype(jnp.float32)}

    return jax.jit(step, out_shardings=replicated(experiment.mesh))
