"""Turns training images, as given to the model, back into pictures."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from densenet_jax.data.pixels import to_picture
from densenet_jax.experiment.experiment import Experiment

_NAMED_SHARE = 0.005  # least share of a mixed label that is named


@dataclasses.dataclass(frozen=True)
class AugmentedSamples:
    """First images of step 0, cropped and augmented."""

    images: np.ndarray  # uint8 [n, h, w, c]
    titles: tuple[str, ...]  # each image's class or labels, with their shares if it is mixed


def augmented_samples(experiment: Experiment, most: int = 16) -> AugmentedSamples:
    """Reads the first batch of this process and augments its first `most` images, on one device.

    Mixing pairs each image with another one of these, not of the whole batch. Erased pixels may lie outside of what a
    picture can show and are clipped.
    """
    with experiment.data.train_batches(0) as batches:
        batch = next(batches)
    images, labels = jax.jit(experiment.augment)(batch["image"][:most], batch["label"][:most], np.int32(0))
    mean, std = (np.asarray(values, np.float32) for values in experiment.data.mean_std())
    pixels = to_picture(255 * (np.asarray(images, np.float32) * std + mean))
    names = experiment.data.train_source.class_names
    titles = tuple(title_of(label, names, experiment.many_labels) for label in np.asarray(labels))
    return AugmentedSamples(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), titles)


def title_of(label: np.ndarray, names: Sequence[str], many_labels: bool) -> str:
    """Names an example's class, or the labels or mixed classes that it has, with their shares."""
    if label.ndim == 0:
        return names[int(label)]
    named = [(share, name) for share, name in zip(label.tolist(), names, strict=True) if share > _NAMED_SHARE]
    if many_labels:
        return ", ".join(name if share == 1 else f"{share:.0%} {name}" for share, name in named) or "none"
    if len(named) == 1:
        return named[0][1]
    return " + ".join(f"{share:.0%} {name}" for share, name in sorted(named, reverse=True))
