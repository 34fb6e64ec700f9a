"""Makes the augmentation of `config.augment`, which runs inside the jitted step."""

from typing import Any

import jax
import jax.numpy as jnp

from densenet_jax.augment import basic as augment
from densenet_jax.augment.color import color_jitter
from densenet_jax.augment.erasing import random_erase
from densenet_jax.augment.mixup import mix
from densenet_jax.augment.randaugment import rand_augment
from densenet_jax.dtypes import DType
from densenet_jax.rng import Purpose, example_keys, step_key
from densenet_jax.training.steps import Augment


def augment_of(config: Any, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int, dtype: DType) -> Augment:
    """Returns the augmentation of images and labels in training, as a function of (seed, step, example)."""

    def apply(images: jax.Array, labels: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        def keys(purpose: Purpose) -> jax.Array:
            return example_keys(step_key(config.seed, purpose, step), images.shape[0])

        if config.augment.flip:
            images = augment.random_flip(images, keys(Purpose.FLIP))
        if config.augment.pad_px:
            images = augment.pad_and_crop(images, keys(Purpose.PAD_CROP), config.augment.pad_px)
        if config.augment.rand_layers:
            fill = tuple(round(255 * value) for value in mean)
            images = rand_augment(
                images,
                keys(Purpose.RAND_AUGMENT),
                num_layers=config.augment.rand_layers,
                magnitude=config.augment.rand_magnitude,
                fill=fill,
            )
        elif any(config.augment.color_jitter):
            brightness, contrast, saturation = config.augment.color_jitter
            images = color_jitter(
                images, keys(Purpose.COLOR), brightness=brightness, contrast=contrast, saturation=saturation
            )
        images = augment.normalize(images, mean, std, jnp.float32 if config.augment.erase else dtype)
        if config.augment.erase:
            images = random_erase(
                images, keys(Purpose.ERASE), probability=config.augment.erase, mode=config.augment.erase_mode
            )
            images = images.astype(dtype)
        if config.augment.mixup_alpha or config.augment.cutmix_alpha:
            return mix(
                images,
                labels,
                step_key(config.seed, Purpose.MIX, step),
                num_classes=num_classes,
                mixup_alpha=config.augment.mixup_alpha,
                cutmix_alpha=config.augment.cutmix_alpha,
                probability=config.augment.mix_probability,
                cutmix_share=config.augment.cutmix_share,
                pair_distance=config.augment.repeats,
            )
        return images, labels

    return apply
