"""Random erasing: the boxes' geometry, their frequency, what is put into them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.augment.erasing import erase_boxes, inside_boxes, random_erase

KEYS = jax.random.split(jax.random.key(0), 1000)
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


@pytest.fixture(scope="module")
def boxes():
    return np.asarray(
        jax.jit(functools.partial(erase_boxes, height=40, width=60, probability=0.25, area=AREA, aspect=ASPECT))(KEYS)
    )


def test_about_a_quarter_is_erased_and_boxes_lie_inside(boxes):
    top, left, height, width = boxes.T
    used = height > 0
    assert 200 < used.sum() < 300
    assert ((width > 0) == used).all()
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 40
    assert (left + width).max() <= 60


def test_area_and_aspect_are_as_asked(boxes):
    height, width = boxes[boxes[:, 2] > 0, 2:].T.astype(float)
    share, aspect = height * width / 2400, height / width
    assert 0.015 < share.min() < share.max() < 0.35
    assert 0.22 < aspect.min() < aspect.max() < 4.5
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    # Log-uniform: as many lie below 1 as above, up to those that do not fit the wide image.
    assert np.log(aspect).mean() == pytest.approx(0.0, abs=0.25)


def test_boxes_as_pixels(boxes):
    inside = np.asarray(inside_boxes(jnp.asarray(boxes), 40, 60))[..., 0]
    for box, pixels in zip(boxes[:50], inside[:50], strict=True):
        expected = np.zeros((40, 60), bool)
        expected[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = True
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["zero", "color", "pixel"])
def test_erased_pixels_by_mode(mode):
    images = jnp.full((200, 16, 16, 3), 5.0)
    erased = np.asarray(jax.jit(functools.partial(random_erase, probability=1.0, mode=mode))(images, KEYS[:200]))
    changed = (erased != 5.0).all(axis=-1)
    assert (changed == (erased != 5.0).any(axis=-1)).all()
    share = changed.mean(axis=(1, 2))
    assert 0.01 < share.min() < share.max() < 0.4
    values = erased[changed]
    if mode == "zero":
        assert (values == 0).all()
        return
    assert abs(values.mean()) < 0.2
    assert values.std() == pytest.approx(1.0, abs=0.15)
    distinct = [len(np.unique(image[where][:, 0])) for image, where in zip(erased, changed, strict=True)]
    expected = np.ones(200) if mode == "color" else changed.sum(axis=(1, 2))
    np.testing.assert_array_equal(distinct, expected)


def test_a_box_that_never_fits_is_given_up():
    draw = functools.partial(erase_boxes, height=8, width=8, probability=1.0, area=(1.5, 2.0), aspect=(1.0, 1.0001))
    boxes = jax.jit(draw)(KEYS[:20])
    assert not np.asarray(boxes[:, 2:]).any()
