"""Makes sources and batches from `config.data` and the batch sizes."""

import dataclasses
import functools
import logging
import math
import os
from typing import Any

import jax

from densenet_jax.config import check_mean_std
from densenet_jax.data.class_names import order_classes, orders_differ
from densenet_jax.data.folder import find_split_folders
from densenet_jax.data.identity import Identity, check_identity, identify, is_contradiction
from densenet_jax.data.pipeline import Batches, eval_batches, train_batches
from densenet_jax.data.prepare import known_set
from densenet_jax.data.records import Source
from densenet_jax.data.settings import Labels, TableSettings
from densenet_jax.data.sources import open_source
from densenet_jax.data.summary import look_at_pixels
from densenet_jax.data.tfds_source import default_directory, is_prepared
from densenet_jax.data.transforms import ResizedCenterCrop, eval_transform, train_transform
from densenet_jax.errors import UserError, list_some
from densenet_jax.models.pretrained import read_class_names
from densenet_jax.models.published import Preprocessing

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """Splits of a run and their batches, opened on first use: an evaluation never opens the training split."""

    config: Any
    preprocessing: Preprocessing
    _warned: set[str] = dataclasses.field(default_factory=set, compare=False)

    @functools.cached_property
    def train_source(self) -> Source:
        """Records to train on."""
        return self._open(self.config.data.train_split)

    def check_batch(self) -> None:
        """Checks that a training batch is not larger than the data set.

        Raises:
            UserError: it is.
        """
        config, examples = self.config, len(self.train_source)
        distinct = config.train.global_batch_size // config.augment.repeats
        if distinct > examples:
            raise UserError(
                f"config.train.global_batch_size is {config.train.global_batch_size}, but {config.data.name} has "
                f"{examples:,} training images; take {examples * config.augment.repeats} or less."
            )

    def count_train_examples(self) -> tuple[int, bool]:
        """Returns the number of training images, and whether they were counted.

        If the data set is not prepared, the number is that of the complete set.

        Raises:
            UserError: the data set is not prepared, and its size is not known.
        """
        config = self.config
        known = known_set(config.data.name).examples.get(config.data.train_split)
        try:
            return len(self.train_source), True
        except UserError:
            if known is None or is_prepared(config.data.name, config.data.dir):
                raise
        held_out = float(config.data.holdout)
        return known - int(held_out if held_out >= 1 else round(held_out * known)), False

    def count_classes(self) -> int:
        """Returns the number of classes: of the data set here, else of the set of that name, else of the settings.

        Raises:
            UserError: none of these has one.
        """
        config = self.config
        known = known_set(config.data.name).classes or config.model.num_classes
        try:
            return self.eval_source.num_classes
        except UserError:
            if not known or is_prepared(config.data.name, config.data.dir):
                raise
        return known

    @functools.cached_property
    def eval_source(self) -> Source:
        """Records to evaluate; the held-out part of train if `eval_split` is "holdout"."""
        return self._open(self.eval_split)

    @functools.cached_property
    def eval_split(self) -> str:
        """Evaluated split; "holdout" also where images are held out of class folders that have none for validation."""
        data = self.config.data
        if data.name == "folder" and data.holdout and data.eval_split in ("validation", "val"):
            directory = data.dir or default_directory()
            return data.eval_split if find_split_folders(directory, data.eval_split) else "holdout"
        return data.eval_split

    def identify(self, *, train: bool) -> Identity:
        """Returns the classes and the files of the evaluated split, with `train` of both, to compare data sets by."""
        splits = {self.eval_split: self.eval_source}
        if train:
            splits[self.config.data.train_split] = self.train_source
        return identify(self.config.data.name, splits) | {"bits": max(self.eval_bits, self.train_bits if train else 0)}

    def check_same(self, saved: Identity | None, where: str, *, train: bool = False) -> Identity:
        """Checks that this is the data set that a checkpoint was trained on, and returns its identity.

        Args:
            saved: identity in the checkpoint; None if it has none.

        Raises:
            UserError: it has other classes or files, and config.data.allow_changed doesn't permit it.
        """
        current = self.identify(train=train)
        if saved is not None:
            check_identity(saved, current, where, self.config.data.allow_changed)
        return current

    def check_weights(self, weights: str) -> None:
        """Compares the order of the classes with that of the weights in a file, as far as it is known.

        Raises:
            UserError: the file has the classes in another order.
        """
        names, classes = read_class_names(weights), self.eval_source.class_names
        weights_have, data_have = (list_some(list(map(repr, some)), 4) for some in (names, classes))
        is_comparable = len(names) == len(classes)
        if is_comparable and is_contradiction(names, classes):
            if not self.config.data.allow_changed:
                raise UserError(
                    f"{weights} has the classes {weights_have}, but the data set {data_have}; name a file with "
                    "the weights' order as config.data.class_order, or set config.data.allow_changed=True."
                )
        elif is_comparable and names != tuple(classes):
            self._warn_once("weights", f"{weights} has the classes {weights_have}, the data set {data_have}.")
        elif names or not os.path.isfile(weights) or self.config.data.name != "folder":
            return
        elif self.config.data.class_order == "text" and orders_differ(classes):
            natural = list_some(list(map(repr, order_classes(classes, "natural"))), 4)
            self._warn_once(
                "order",
                f"{weights} doesn't name its classes; this data set's are in text order ({data_have}), timm's "
                f"would be in natural order ({natural}): config.data.class_order=natural.",
            )

    @functools.cached_property
    def train_bits(self) -> int:
        """Bits of a training pixel: 16 if a sample of the files has more than 8."""
        return self._look_at(self.train_source)

    @functools.cached_property
    def eval_bits(self) -> int:
        """Bits of an evaluated pixel, as for `train_bits`."""
        return self._look_at(self.eval_source)

    @property
    def train_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of training images as given to the model."""
        side = self.config.data.image_size_px
        return side, side, self.config.data.channels

    @property
    def eval_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of evaluated images as given to the model."""
        side = self.config.eval.image_size_px or self.config.data.image_size_px
        return side, side, self.config.data.channels

    @functools.cached_property
    def allowed_classes(self) -> tuple[int, ...] | None:
        """Classes that evaluation may predict; None allows all. Reads the labels of the split if it must.

        Raises:
            UserError: the data set has several right classes an image.
        """
        config = self.config
        if not config.eval.class_map:
            return None
        if self.eval_source.label_sets:
            raise UserError(
                f"config.eval.class_map is {config.eval.class_map!r}, but {config.data.name} has several right classes "
                "an image; leave it empty."
            )
        return tuple(sorted(set(self.eval_source.labels().tolist())))

    @property
    def eval_batch_size(self) -> int:
        """Examples of an evaluation step over all devices."""
        return self.config.eval.batch_size or self.config.train.global_batch_size

    @property
    def eval_batch_count(self) -> int:
        """Number of batches in an evaluation."""
        return math.ceil(len(self.eval_source) / self.eval_batch_size)

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, for normalizing images in [0, 1].

        Raises:
            UserError: there are more or fewer numbers than channels.
        """
        config = self.config
        mean, std = config.data.mean or self.preprocessing.mean, config.data.std or self.preprocessing.std
        check_mean_std(mean, std, config.data.channels)
        return mean, std

    def train_batches(self, start_step: int) -> Batches:
        """Yields this process's shares of the global batches from `start_step` on, without end."""
        config = self.config
        transform = train_transform(
            **self._decoding(self.train_bits, config.data.exif_orientation),
            kind=config.data.crop,
            image_size_px=config.data.image_size_px,
            area_range=config.data.crop_area,
            aspect_range=config.data.crop_aspect,
            interpolation=config.data.interpolation,
            antialias=config.data.antialias,
        )
        return train_batches(
            self.train_source,
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            start_step=start_step,
            transform=transform,
            on_damaged=config.data.on_damaged,
            repeats=config.augment.repeats,
            sampler=config.data.sampler,
            **self._reading(),
        )

    def eval_batches(self) -> Batches:
        """Yields this process's shares of the evaluated split, padded and masked."""
        options = {"global_batch_size": self.eval_batch_size, "transform": self.eval_transform(), **self._reading()}
        return eval_batches(self.eval_source, **options)

    def eval_transform(self) -> ResizedCenterCrop:
        """Host-side preprocessing of evaluation."""
        return self.transform(self.eval_bits, self.config.data.exif_orientation)

    def transform(self, bits: int, apply_exif_orientation: bool) -> ResizedCenterCrop:
        """Returns the preprocessing of evaluation for pixels of `bits` bits, perhaps applying the EXIF orientation."""
        config = self.config
        side = self.eval_shape[0]
        return eval_transform(
            image_size_px=side,
            resize_px=round(side / (config.eval.crop_fraction or self.preprocessing.crop_fraction)),
            interpolation=config.eval.interpolation or self.preprocessing.interpolation,
            **self._decoding(bits, apply_exif_orientation),
            crops=5 if config.eval.crops == 10 else 1,  # mirrored on the accelerator
        )

    def _decoding(self, bits: int, apply_exif_orientation: bool) -> dict[str, Any]:
        return {
            "bits": bits,
            "pixel_range": tuple(self.config.data.pixel_range),
            "dicom_frame": self.config.data.dicom_frame,
            "apply_exif_orientation": apply_exif_orientation,
            "channels": self.config.data.channels,
        }

    def _look_at(self, source: Source) -> int:
        bits, warnings = look_at_pixels(source)
        if self.config.data.pixel_range:
            bits, _ = 16, warnings.pop("dark", None)
        if self.config.data.exif_orientation:
            warnings.pop("turned", None)
        for kind, text in warnings.items():
            self._warn_once(kind, text)
        return bits

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            logger.warning("%s", text)
        self._warned.add(kind)

    def _open(self, split: str) -> Source:
        config = self.config
        return open_source(
            config.data.name,
            config.data.dir,
            split,
            holdout=float(config.data.holdout),
            class_order=config.data.class_order,
            labels=Labels.from_config(config),
            table=TableSettings.from_config(config),
        )

    def _reading(self) -> dict[str, Any]:
        return {
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
            "reader_threads": self.config.data.reader_threads,
            "prefetch_batches": self.config.data.prefetch_batches,
        }
