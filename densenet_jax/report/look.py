"""Collects what a run's page shows beyond its metrics: predictions, mistakes, augmented images."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.errors import UserError
from densenet_jax.experiment import AugmentedSamples, Experiment, augmented_samples
from densenet_jax.predict.calibration import Calibration, read_calibration
from densenet_jax.predict.explain import activation_maps
from densenet_jax.report.gather import Answers, LabelAnswers, gather_answers, gather_label_answers
from densenet_jax.report.labels import LabelTable
from densenet_jax.run.evaluate import predict_batches
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


def look_at(experiment: Experiment, workdir: str) -> Look:
    """Predicts the evaluated split with the saved model and augments some training images."""
    seen: dict[str, Any] = {}
    missing = []
    try:
        seen |= {"samples": augmented_samples(experiment), "timeline": experiment.timeline}
    except UserError as error:
        missing.append(f"No augmented training images: {error}")
    try:
        step, variables = experiment.saved_variables(workdir)
        data = experiment.data
        many, source = experiment.many_labels, data.eval_source
        calibration = read_calibration(workdir, step, source.num_classes)
        explain = compile_explaining_step(experiment)
        gather: Any = gather_label_answers if many else gather_answers
        with data.eval_batches() as batches:
            answers = gather(predict_batches(explain, variables, batches, experiment.mesh, data.eval_batch_count))
        names = tuple(source[mistake.index].name for mistake in answers.mistakes)
        seen |= {"step": step, "calibration": calibration, "groups": source.groups(), "names": names}
        seen |= {"class_names": source.class_names, "label_answers" if many else "answers": answers}
        if many and jax.process_index() == 0:
            seen["label_table"] = LabelTable.from_answers(answers, source.class_names, source.groups(), calibration)
    except UserError as error:
        missing.append(f"No predictions: {error}")
    for why in missing:
        logger.warning("%s", why)
    return Look(missing=tuple(missing), **seen)


def compile_explaining_step(experiment: Experiment) -> PredictStep:
    """Extends the step that predicts by "map" float32 [b, h, w], a class activation map, of the center crop of several.

    It is that of the predicted class, or of many labels that of "worst" int [b], the one with the largest error.
    """
    many = experiment.many_labels
    predict_step = experiment.compile_logits_step() if many else experiment.compile_predict_step()

    def step(variables: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        outputs = predict_step(variables, batch)
        images = batch["image"] if batch["image"].ndim == 4 else batch["image"][:, -1]
        if many:
            errors = jnp.where(outputs["label"] > 0, -outputs["logit"], outputs["logit"])
            chosen = jnp.argmax(jnp.where(jnp.isnan(outputs["label"]), -jnp.inf, errors), axis=-1)
            outputs = {**outputs, "worst": chosen}
        else:
            chosen = jnp.argmax(outputs["probability"], axis=-1)
        maps = activation_maps(experiment.model, variables, experiment.normalize(images), chosen)
        return {**outputs, "map": maps.astype(jnp.float32)}

    return jax.jit(step, out_shardings=replicated(experiment.mesh))
