"""Collects what a run's page shows beyond its metrics: predictions, mistakes, augmented images."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from densenet_jax.errors import UserError
from densenet_jax.experiment import AugmentedSamples, Experiment, augmented_samples
from densenet_jax.experiment.augmentation import normalize_with
from densenet_jax.predict.explain import activation_maps
from densenet_jax.report.gather import Answers, gather_answers
from densenet_jax.scores.classes import ClassScores
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

    def scores(self) -> ClassScores:
        """Computes precision, recall and F1 of each class; needs `answers`."""
        assert self.answers is not None
        return self.answers.scores(len(self.class_names))


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
        with data.eval_batches() as batches:
            answers = gather_answers(
                compile_explaining_step(experiment),
                variables,
                batches,
                experiment.mesh,
                batch_count=data.eval_batch_count,
            )
        names = tuple(data.eval_source[mistake.index].name for mistake in answers.mistakes)
        look = dataclasses.replace(
            look, step=step, answers=answers, names=names, class_names=tuple(data.eval_source.class_names)
        )
    except UserError as error:
        missing.append(f"No predictions: {error}")
    for why in missing:
        logger.warning("%s", why)
    return dataclasses.replace(look, missing=tuple(missing))


def compile_explaining_step(
    experiment: Experiment,
) -> Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]:
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
