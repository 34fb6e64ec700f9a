"""Small models of every family, ready to be exported, and images that are no digits."""

import functools

import jax
import numpy as np

from densenet_jax.data.transforms import eval_transform
from densenet_jax.export.export import ExportOptions, export
from densenet_jax.export.samples import CheckImages, generate_images
from densenet_jax.predict.model import Deployed
from tests.models.test_fold import drawn

SIDE_PX = 32
FAMILIES = ("small_densenet", "small_cifar", "small_densenet_blur", "small_dpn_b", "small_rdnet")


@functools.cache
def small_model(name="small_cifar"):
    """An untrained model of one family as the export mode is given it."""
    module, variables = drawn(name, np.float32)
    return Deployed(
        name=name,
        source="drawn weights",
        module=module,
        variables=jax.device_put(variables),
        transform=eval_transform(image_size_px=SIDE_PX, resize_px=SIDE_PX, channels=3, interpolation="bilinear"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        dtype=np.float32,
        class_names=tuple("abcdefg"),
    )


def images(count=9):
    return generate_images(count, (SIDE_PX, SIDE_PX, 3))


class FixedSamples:
    """Samples without a data set."""

    def __init__(self, count=9, real=True):
        self.images, self.real = images(count), real

    def to_check(self, transform, most):
        return CheckImages(self.images[:most], None, "fixed images", self.real)

    def representative(self, transform, most):
        return self.images[:most]


def export_small(path, name="small_cifar", samples=None, **options):
    """Exports a small model; returns it and the figures of the last line."""
    model = small_model(name)
    figures = export(lambda: model, samples or FixedSamples(), ExportOptions(output=str(path), **options))
    return model, figures
