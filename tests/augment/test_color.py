"""Color operations against their definitions in numpy, and their random order and strength."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.augment.basic import uniforms
from densenet_jax.augment.color import BRIGHTNESS, CONTRAST, SATURATION, adjust_color, color_jitter


def by_definition(image, operation, factor):
    gray = image @ np.array([0.2989, 0.587, 0.114]) if image.shape[-1] == 3 else image[..., 0]
    reference = {BRIGHTNESS: 0.0, CONTRAST: gray.mean(), SATURATION: gray[..., None]}[operation]
    return np.clip(factor * image + (1 - factor) * reference, 0, 1)


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(size=(6, 5, 4, 3))


def test_each_operation(images):
    operations = np.array([BRIGHTNESS, CONTRAST, SATURATION] * 2)
    factors = np.array([0.5, 0.5, 0.5, 1.4, 1.4, 1.4])
    adjusted = jax.jit(adjust_color)(
        jnp.asarray(images, jnp.float32), jnp.asarray(operations), jnp.asarray(factors, jnp.float32)
    )
    expected = [by_definition(*case) for case in zip(images, operations, factors, strict=True)]
    np.testing.assert_allclose(adjusted, np.stack(expected), atol=1e-6)


def test_gray_images_have_no_saturation(images):
    gray = jnp.asarray(images[..., :1], jnp.float32)
    adjusted = jax.jit(adjust_color)(gray, jnp.full(6, SATURATION), jnp.full(6, 0.3))
    np.testing.assert_allclose(adjusted, gray, atol=1e-6)


def test_no_strength_changes_nothing(images):
    keys = jax.random.split(jax.random.key(0), 6)
    still = jax.jit(functools.partial(color_jitter, brightness=0.0, contrast=0.0, saturation=0.0))
    jittered = still(jnp.asarray(images, jnp.float32), keys)
    np.testing.assert_allclose(jittered, images, atol=1e-6)


def test_every_order_occurs_and_factors_fill_their_range():
    # A color whose result tells the order and, for brightness alone, the factor.
    image = np.array([[[0.8, 0.4, 0.2], [0.1, 0.3, 0.6]]])
    many = jnp.asarray(np.repeat(image[None], 600, axis=0), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 600)
    bright = np.asarray(jax.jit(functools.partial(color_jitter, contrast=0.0, saturation=0.0))(many, keys))
    factors = bright[:, 0, 1, 0] / 0.1
    assert factors.min() == pytest.approx(0.6, abs=0.02)
    assert factors.max() == pytest.approx(1.4, abs=0.02)
    assert factors.mean() == pytest.approx(1.0, abs=0.04)

    jittered = np.asarray(jax.jit(color_jitter)(many, keys))

    numbers = np.asarray(uniforms(keys, 6))
    orders, strengths_of = numbers[:, :3].argsort(axis=1), 0.6 + 0.8 * numbers[:, 3:]
    outcomes = {}
    for result, order, strengths in zip(jittered, map(tuple, orders.tolist()), strengths_of, strict=True):
        expected = image
        for operation in order:
            expected = by_definition(expected, operation, strengths[operation])
        np.testing.assert_allclose(result, expected, atol=2e-6)
        outcomes[order] = outcomes.get(order, 0) + 1
    assert set(outcomes) == set(itertools.permutations(range(3)))
    assert min(outcomes.values()) > 70


def test_bytes_become_floats_in_range():
    images = jnp.asarray(np.random.default_rng(2).integers(0, 256, size=(4, 6, 6, 3)).astype(np.uint8))
    jittered = jax.jit(color_jitter)(images, jax.random.split(jax.random.key(2), 4))
    assert jittered.dtype == jnp.float32
    assert 0.0 <= float(jittered.min()) <= float(jittered.max()) <= 1.0
