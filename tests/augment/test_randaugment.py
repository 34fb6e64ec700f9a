"""Each operation against Pillow's, and the draw of operations and strengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from densenet_jax.augment.randaugment import NOTHING, OPERATIONS, apply_operations, rand_augment

FILL = (124, 116, 104)
APPLY = jax.jit(functools.partial(apply_operations, fill=FILL))
LEVELS = (0.0, 3.3, 6.0, 9.0, 10.0)


@pytest.fixture(scope="module")
def images():
    """Smooth pictures with noise, a flat one and one of two values: 15 alike batches go through one program."""
    rng = np.random.default_rng(0)
    ramps = np.linspace(20, 200, 20)[None, :, None, None] + np.linspace(0, 50, 24)[None, None, :, None]
    pictures = ramps * rng.uniform(0.3, 1.0, (len(LEVELS), 1, 1, 3)) + rng.normal(0, 9, (len(LEVELS), 20, 24, 3))
    pictures[0] = 77
    pictures[1] = np.where(pictures[1] > 100, 200, 50)
    return np.clip(pictures, 0, 255).astype(np.uint8)


def by_pillow(array, name, level, sign):
    """Timm's arithmetic from level to argument, and Pillow's operation."""
    image, share = Image.fromarray(array), level / 10
    affine = functools.partial(
        image.transform, image.size, Image.Transform.AFFINE, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )
    match name:
        case "auto_contrast":
            image = ImageOps.autocontrast(image)
        case "equalize":
            image = ImageOps.equalize(image)
        case "invert":
            image = ImageOps.invert(image)
        case "posterize":
            kept = 4 - int(share * 4)
            image = image.point([value & (0xFF00 >> kept) & 0xFF for value in range(256)] * 3)
        case "solarize":
            image = ImageOps.solarize(image, 256 - int(share * 256))
        case "solarize_add":
            image = image.point([min(255, v + int(share * 110)) if v < 128 else v for v in range(256)] * 3)
        case "color" | "contrast" | "brightness" | "sharpness":
            enhance = getattr(ImageEnhance, name.capitalize())
            image = enhance(image).enhance(max(0.1, 1 + sign * share * 0.9))
        case "shear_x":
            image = affine(data=(1, sign * share * 0.3, 0, 0, 1, 0))
        case "shear_y":
            image = affine(data=(1, 0, 0, sign * share * 0.3, 1, 0))
        case "translate_x":
            image = affine(data=(1, 0, sign * share * 0.45 * image.size[0], 0, 1, 0))
        case "translate_y":
            image = affine(data=(1, 0, 0, 0, 1, sign * share * 0.45 * image.size[1]))
        case "rotate":
            image = image.rotate(sign * share * 30, resample=Image.Resampling.BILINEAR, fillcolor=FILL)
    return np.asarray(image)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_pillows(images, name, sign):
    operations = jnp.full(len(LEVELS), OPERATIONS.index(name))
    actual = APPLY(jnp.asarray(images), operations, jnp.asarray(LEVELS), jnp.full(len(LEVELS), sign))
    expected = np.stack([by_pillow(image, name, level, sign) for image, level in zip(images, LEVELS, strict=True)])
    difference = np.abs(np.asarray(actual, int) - expected)
    if name in ("equalize", "invert", "posterize", "solarize", "solarize_add"):
        assert difference.max() == 0
    assert difference.max() <= 1 or name == "rotate"
    # A sample on the very edge of the image may fall on its other side.
    assert (difference > 1).mean() < 0.002
    assert (difference > 0).mean() < 0.02
    assert (np.asarray(actual) != images)[3].any()


def test_mixed_batch_gives_each_its_own(images):
    count = len(OPERATIONS) + 1
    many = jnp.asarray(np.repeat(images[3:4], count, axis=0))
    together = jax.jit(functools.partial(apply_operations, fill=FILL))(
        many, jnp.arange(count), jnp.full(count, 9.0), jnp.ones(count)
    )
    for index, name in enumerate(OPERATIONS):
        expected = by_pillow(images[3], name, 9.0, 1.0)
        assert (np.abs(np.asarray(together[index], int) - expected) > 1).mean() < 0.002
    np.testing.assert_array_equal(together[NOTHING], images[3])


def test_gray_images(images):
    gray = jnp.asarray(images[..., :1])
    operations = jnp.full(len(LEVELS), OPERATIONS.index("rotate"))
    rotate = jax.jit(functools.partial(apply_operations, fill=FILL[:1]))
    rotated = rotate(gray, operations, jnp.asarray(LEVELS), jnp.ones(len(LEVELS)))
    expected = Image.fromarray(images[2, ..., 0]).rotate(18, resample=Image.Resampling.BILINEAR, fillcolor=FILL[0])
    assert (np.abs(np.asarray(rotated[2, ..., 0], int) - np.asarray(expected)) > 1).mean() < 0.01


@pytest.mark.parametrize("name", OPERATIONS)
def test_sixteen_bits_answer_as_eight_do_and_stay_sixteen(images, name):
    operations = jnp.full(len(images), OPERATIONS.index(name))
    arguments = operations, jnp.asarray(LEVELS), jnp.ones(len(images))
    narrow = np.asarray(APPLY(images, *arguments)).astype(np.int64)
    wide = np.asarray(APPLY(images.astype(np.uint16) * 257, *arguments))
    assert wide.dtype == np.uint16
    assert np.abs(wide.astype(np.int64) - 257 * narrow).max() <= 2 * 257
    if name == "invert":
        fine = images.astype(np.uint16) * 257 - 100
        np.testing.assert_array_equal(APPLY(fine, *arguments), 65535 - fine)


def test_draws_are_a_function_of_the_key_and_touch_the_expected_share(images):
    many = jnp.asarray(np.repeat(images[3:4], 300, axis=0))
    augment = jax.jit(functools.partial(rand_augment, num_layers=1, probability=0.5))
    keys = jax.random.split(jax.random.key(0), 300)
    first = np.asarray(augment(many, keys))
    np.testing.assert_array_equal(first, augment(many, keys))
    np.testing.assert_array_equal(first[::-1], augment(many, keys[::-1]))
    changed = (first != images[3]).any(axis=(1, 2, 3)).mean()
    assert 0.35 < changed < 0.6
    assert len({image.tobytes() for image in first}) > 80
