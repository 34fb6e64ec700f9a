"""Normalization, flips and crops: exact results, right frequencies, the same on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from densenet_jax.augment.basic import normalize, pad_and_crop, random_flip, to_float
from densenet_jax.augment.color import color_jitter
from densenet_jax.augment.erasing import random_erase
from densenet_jax.rng import Purpose, example_keys, step_key

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=shape).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def keys_of(count, step=0):
    return example_keys(step_key(0, Purpose.FLIP, step), count)


def test_normalize_is_the_references_formula_for_bytes_and_floats():
    images = random_bytes(2, 5, 6, 3)
    expected = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalize(jnp.asarray(images), MEAN, STD), expected, atol=1e-6)
    np.testing.assert_allclose(normalize(to_float(jnp.asarray(images)), MEAN, STD), expected, atol=1e-6)
    assert normalize(jnp.asarray(images), MEAN, STD, jnp.bfloat16).dtype == jnp.bfloat16


def test_flip_mirrors_about_half_of_the_images():
    images = random_bytes(400, 2, 3, 1)
    flipped = np.asarray(jax.jit(random_flip)(jnp.asarray(images), keys_of(400)))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    untouched = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored | untouched).all()
    assert 160 < mirrored.sum() < 240


def test_pad_and_crop_cuts_every_place_out_of_zeros():
    images = np.arange(1, 33, dtype=np.uint8).reshape(1, 4, 8, 1).repeat(500, axis=0)
    crops = np.asarray(jax.jit(pad_and_crop, static_argnums=2)(images, keys_of(500), 1))
    padded = np.pad(images[0], ((1, 1), (1, 1), (0, 0)))
    places = [padded[top : top + 4, left : left + 8] for top in range(3) for left in range(3)]
    counts = [(crops == place).all(axis=(1, 2, 3)).sum() for place in places]
    assert sum(counts) == 500
    assert min(counts) > 30


def test_another_step_and_another_example_see_other_pixels():
    images, crop = random_bytes(1, 16, 16, 3).repeat(8, axis=0), jax.jit(pad_and_crop, static_argnums=2)
    first, again, later = (np.asarray(crop(images, keys_of(8, step), 4)) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not (first == later).all()
    assert len({image.tobytes() for image in first}) > 4


def test_sharded_batch_sees_the_same_pixels_without_moving_them():
    def augmented(images, step):
        def keys(purpose):
            return example_keys(step_key(5, purpose, step), images.shape[0])

        images = random_flip(images, keys(Purpose.FLIP))
        images = pad_and_crop(images, keys(Purpose.PAD_CROP), 2)
        images = color_jitter(images, keys(Purpose.COLOR))
        return random_erase(images, keys(Purpose.ERASE), probability=0.5, mode="color")

    images = jnp.asarray(random_bytes(16, 8, 8, 3))
    alone = jax.jit(augmented)(images, 7)
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(images, over_data)
    compiled = jax.jit(augmented, out_shardings=over_data).lower(placed, 7).compile()
    np.testing.assert_allclose(compiled(placed, 7), alone, atol=1e-6)
    # Keys may travel, pictures may not.
    lines = compiled.as_text().splitlines()
    for collective in (" all-gather", " all-to-all", " collective-permute", " all-reduce"):
        assert not [line for line in lines if collective in line and ",8,8," in line]


def test_16_bits_are_the_same_brightness():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
    wide = pixels.astype(np.uint16) * 257
    mean, std = (0.4,) * 5, (0.2,) * 5
    np.testing.assert_allclose(
        normalize(jnp.asarray(wide), mean, std), normalize(jnp.asarray(pixels), mean, std), atol=2e-6
    )
    np.testing.assert_allclose(to_float(jnp.asarray(wide)), pixels / np.float32(255), atol=1e-6)
