"""Loads a trained model for use outside of its run: module, weights and preprocessing."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from densenet_jax.choices import DTYPES
from densenet_jax.config.run_settings import started_from
from densenet_jax.data.class_names import read_labels
from densenet_jax.data.identity import Identity, is_contradiction, read_identity
from densenet_jax.data.tfds_source import is_prepared
from densenet_jax.data.transforms import ResizedCenterCrop, eval_transform
from densenet_jax.errors import UserError
from densenet_jax.experiment.experiment import Experiment
from densenet_jax.models.create import create_model
from densenet_jax.models.dialects import thresholds_of
from densenet_jax.models.pretrained import load_pretrained, read_class_names, read_state_dict
from densenet_jax.models.variants import get_variant
from densenet_jax.predict.calibration import Calibration, read_calibration
from densenet_jax.training.restore import find_checkpoint, restore_variables
from densenet_jax.workdir import labels_path

logger = logging.getLogger(__name__)
_IMAGENET = pathlib.Path(__file__).with_name("imagenet_labels.txt")


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A model ready to predict, without settings or data set."""

    name: str
    source: str  # origin of the weights for messages, such as "step 1200 of runs/digits" or a hub id
    module: nn.Module  # flax module; `module.clone(output="pooled")` returns features
    variables: dict[str, Any]  # {"params", "batch_stats"} on this process's first device
    # Maps an encoded image (or pixels: `of_pixels`) to uint8 [transform.shape] as in evaluation, after applying its
    # EXIF orientation.
    transform: ResizedCenterCrop
    mean: tuple[float, ...]  # like `std`, a number a channel for images in [0, 1]
    std: tuple[float, ...]
    dtype: Any
    class_names: tuple[str, ...]
    allowed_classes: tuple[int, ...] | None = None  # the only classes that may be predicted; None allows all
    dataset: Identity | None = None
    calibration: Calibration | None = None  # already in the weights of the classifier
    many_labels: bool = False  # images have many labels, each with a probability of its own, instead of one class

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Probability of each label from which on it is predicted; None without a calibration of many labels."""
        return (self.calibration.thresholds or None) if self.calibration is not None else None


def make_deployed(config: Any, workdir: str, labels: str = "") -> Deployed:
    """Loads the model that `--mode eval` would evaluate: a checkpoint of `workdir` or `config.model.pretrained`.

    `labels` is a file with one class name a line; "" uses the run's own names.

    Raises:
        UserError: there is no such model, or it does not fit the settings.
    """
    dataset: Identity | None = None
    calibration: Calibration | None = None
    if config.model.pretrained and not started_from(workdir, config.model.pretrained):
        source, workdir = config.model.pretrained, ""
        average = config.model.pretrained_average
        changes = {"channels": config.data.channels, **Experiment(config).architecture}
        state = read_state_dict(source, average)
        variables = load_pretrained(config.model.name, source, state=state, **changes)
        calibration = _own_thresholds(state, variables, source)
    else:
        directory, step = find_checkpoint(workdir, str(config.eval.checkpoint), config.checkpoint.best_metric)
        variables = restore_variables(directory, step, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
        source, dataset = f"step {step} of {workdir}", read_identity(workdir, step)
    experiment = Experiment(config, head_classes=_class_count(variables, source))
    experiment.check_fits(variables, source)
    if workdir:
        calibration = read_calibration(workdir, step, experiment.num_classes)
    if calibration is not None:
        source, variables = f"{source}, {calibration.describe()}", calibration.scale(variables)
    mean, std = experiment.data.mean_std()
    is_wide = config.data.pixel_range or (dataset or {}).get("bits") == 16  # it was trained so; else as an image has
    return Deployed(
        name=config.model.name,
        source=source,
        module=experiment.model,
        variables=variables,
        transform=experiment.data.transform(16 if is_wide else 0, apply_exif_orientation=True),
        mean=tuple(mean),
        std=tuple(std),
        dtype=experiment.dtype,
        class_names=_class_names(experiment, workdir, labels, dataset),
        allowed_classes=experiment.data.allowed_classes,
        dataset=dataset,
        calibration=calibration,
        many_labels=experiment.many_labels or bool(calibration is not None and calibration.thresholds),
    )


def make_deployed_from_pretrained(name: str, source: str, labels: str = "", dtype: str = "float32") -> Deployed:
    """Loads a published or local checkpoint with the preprocessing of its publisher.

    Args:
        source: as in `load_pretrained`.
        labels: file with one class name a line; "" uses ImageNet's names for 1,000 classes, else numbers.
        dtype: as `config.model.dtype`.

    Raises:
        UserError: there is no such variant, checkpoint or dtype, or the labels don't fit.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    variant = get_variant(name)
    state = read_state_dict(source)
    variables = load_pretrained(name, source, channels=variant.channels, state=state)
    count, calibration = _class_count(variables, source), _own_thresholds(state, variables, str(source))
    seen = variant.preprocessing_of(str(source))
    transform = eval_transform(
        image_size_px=seen.test_px,
        resize_px=round(seen.test_px / seen.crop_fraction),
        channels=variant.channels,
        interpolation=seen.interpolation,
        apply_exif_orientation=True,
        bits=0,
    )
    module: Any = create_model(name, num_classes=count, dtype=jnp.dtype(dtype))
    names = read_class_names(source) or (imagenet_labels() if count == 1000 else _numbers(count))
    if labels:
        names = read_labels(labels)
        _check_count(names, count, labels)
    deployed = Deployed(name, str(source), module, variables, transform, seen.mean, seen.std, module.dtype, names)
    return dataclasses.replace(deployed, calibration=calibration, many_labels=calibration is not None)


def _own_thresholds(state: Mapping[str, Any], variables: Mapping[str, Any], source: str) -> Calibration | None:
    """Returns the thresholds that torchxrayvision keeps beside its weights."""
    calibration = Calibration.from_thresholds(thresholds_of(state), _class_count(variables, source), source)
    if calibration is not None:
        logger.warning(
            "%s has operating points (op_threshs): each output is a label with a probability and threshold of its own.",
            source,
        )
    return calibration


def _class_count(variables: Mapping[str, Any], where: str) -> int:
    try:
        return int(variables["params"]["classifier"]["bias"].shape[0])
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{where} has no classifier; expected a checkpoint of a classification model.") from error


def _class_names(experiment: Experiment, workdir: str, labels: str, dataset: Identity | None = None) -> tuple[str, ...]:
    """Returns the names in `labels`, else in the run's labels.txt, checkpoint or data set, ImageNet, else numbers."""
    count, data = experiment.num_classes, experiment.config.data
    names: tuple[str, ...] = ()
    if labels:
        names, where = read_labels(labels), labels
    elif workdir and os.path.exists(where := labels_path(workdir)):
        names = read_labels(where)
        if dataset is not None and is_contradiction(names, dataset["classes"]):
            logger.warning("%s contradicts the checkpoint, whose own class names are used.", where)
            names = tuple(dataset["classes"])
        names = _make_readable(names)
    elif not workdir and (own := read_class_names(data_source := experiment.config.model.pretrained)):
        names, where = _make_readable(own), data_source
    elif dataset is not None:
        names, where = _make_readable(tuple(dataset["classes"])), "the checkpoint"
    elif count == 1000 and (not workdir or data.name.startswith("imagenet")):
        return imagenet_labels()
    elif workdir and (data.name == "folder" or is_prepared(data.name, data.dir)):
        with contextlib.suppress(UserError):
            names, where = _make_readable(tuple(experiment.data.eval_source.class_names)), f"data set {data.name}"
    if not names:
        return _numbers(count)
    _check_count(names, count, where)
    return names


@functools.cache
def imagenet_labels() -> tuple[str, ...]:
    """Returns a short name for each ImageNet-1k class, in the order of the published weights (281 is "tabby")."""
    return read_labels(_IMAGENET)


def _check_count(names: Sequence[str], num_classes: int, where: str) -> None:
    if len(names) != num_classes:
        raise UserError(
            f"{where} has {len(names)} labels, but the model has {num_classes} classes; give one label a class."
        )


def _make_readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replaces ImageNet's 1,000 WordNet ids (n01440764, ...) with words; returns other names as they are."""
    ids = len(names) == 1000 and list(names) == sorted(names) and all(re.fullmatch(r"n\d{8}", name) for name in names)
    return imagenet_labels() if ids else names


def _numbers(count: int) -> tuple[str, ...]:
    logger.warning("class names are unknown, so classes are numbered; give --labels a file with one name a line.")
    return tuple(str(number) for number in range(count))
