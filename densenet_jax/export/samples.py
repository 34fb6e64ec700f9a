"""Chooses images to check a file with: given ones, else the data set's, else generated ones."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from densenet_jax.data.pixels import widen
from densenet_jax.data.records import DamagedImage, Source
from densenet_jax.data.tfds_source import is_prepared
from densenet_jax.data.transforms import ResizedCenterCrop
from densenet_jax.errors import UserError
from densenet_jax.experiment.experiment import Experiment
from densenet_jax.predict.files import check_places, find_images
from densenet_jax.predict.images import read_file
from densenet_jax.predict.model import Deployed


@dataclasses.dataclass(frozen=True)
class CheckImages:
    """Preprocessed images."""

    images: np.ndarray  # uint8 [n, h, w, c]
    labels: np.ndarray | None  # class numbers [n], or many labels [n, k]; None if unknown
    source: str  # description for messages
    real: bool  # False for generated images


@dataclasses.dataclass(frozen=True)
class Samples:
    """Source of images: the data set of the settings, or given places."""

    config: Any
    places: tuple[str, ...] = ()  # files, folders and patterns to use instead of the data set

    def check_same(self, model: Deployed) -> None:
        """Checks that the data set, where it is used, is the one that the checkpoint was trained on.

        Raises:
            UserError: it has other classes or files.
        """
        if not self.places and self._prepared():
            Experiment(self.config).data.check_same(model.dataset, model.source)

    def to_check(self, transform: ResizedCenterCrop, most: int) -> CheckImages:
        """Returns up to `most` images: given ones, else spread over the evaluated split, else generated ones.

        Raises:
            UserError: a given image can't be read, or the data set can't.
        """
        config, transform = self.config, transform.with_fixed_bits()
        if self.places:
            return CheckImages(self._given(transform, most), None, "the given images", True)
        if not self._prepared():
            source = f"generated images, since {config.data.name} is not prepared"
            return CheckImages(generate_images(most, transform.shape, transform.dtype), None, source, False)
        data = Experiment(config).data
        records = data.eval_source
        images, labels = _spread(records, transform, most)
        known = None if records.label_sets else labels
        return CheckImages(images, known, f"images of {config.data.name} {data.eval_split}", True)

    def representative(self, transform: ResizedCenterCrop, most: int) -> np.ndarray:
        """Returns up to `most` training images uint8 [n, h, w, c], preprocessed as in evaluation, to calibrate int8.

        If the data set is not prepared, they are the given images.

        Raises:
            UserError: there are no images, or they can't be read.
        """
        transform = transform.with_fixed_bits()
        if self.places and not self._prepared():
            return self._given(transform, most)
        return _spread(Experiment(self.config).data.train_source, transform, most)[0]

    def _given(self, transform: ResizedCenterCrop, most: int) -> np.ndarray:
        check_places(self.places)
        paths = (image.path for image in itertools.islice(find_images(self.places), most))
        return np.stack([transform(read_file(path), name=path) for path in paths])

    def _prepared(self) -> bool:
        data = self.config.data  # the digits are prepared on first use
        return data.name in ("digits", "folder", "table") or is_prepared(data.name, data.dir)


def generate_images(count: int, shape: Sequence[int], dtype: Any = np.uint8) -> np.ndarray:
    """Generates smooth color patterns with noise, always the same ones: uint8 or uint16 [count, *shape]."""
    rng = np.random.default_rng(7)
    height, width, channels = shape
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    images = np.empty((count, height, width, channels), np.uint8)
    for image in images:
        waves = rng.uniform(-6, 6, (channels, 3))
        for channel, (down, across, phase) in enumerate(waves):
            pattern = 127 + 90 * np.sin(down * y * 3 + across * x * 3 + phase) + rng.normal(0, 15, (height, width))
            image[:, :, channel] = np.clip(pattern, 0, 255)
    return widen(images) if dtype == np.uint16 else images


def _spread(source: Source, transform: ResizedCenterCrop, most: int) -> tuple[np.ndarray, np.ndarray]:
    indices = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(int))
    images, labels = [], []
    for index in indices:
        try:
            record = source[int(index)]
            images.append(transform(record.image, name=record.name))
        except DamagedImage:
            continue
        labels.append(record.label)
    if not images:
        raise UserError("none of the data set's images can be read; run --mode prepare to see why.")
    return np.stack(images), np.asarray(labels)
