"""Mixup and cutmix against the definitions in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from densenet_jax.errors import UserError
from densenet_jax.training.mixing import cut_boxes, mix, partners

IMAGES = np.random.default_rng(0).normal(size=(8, 12, 10, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1, 2])
ONE_HOT = np.eye(5)[LABELS]
PAIRED = [1, 0, 3, 2, 5, 4, 7, 6]


def run(key, **settings):
    step = jax.jit(functools.partial(mix, num_classes=5, **settings))
    images, labels = step(jnp.asarray(IMAGES), jnp.asarray(LABELS), jax.random.key(key))
    assert labels.dtype == jnp.float32
    np.testing.assert_allclose(np.sum(labels, axis=1), 1.0, rtol=1e-6)
    return np.asarray(images), np.asarray(labels)


def own_share(labels):
    """The share of its own label that each example kept."""
    return labels[np.arange(8), LABELS]


def test_partners_change_places_in_blocks():
    order = jnp.arange(12)
    assert partners(order).tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
    assert partners(order, 3).tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    with pytest.raises(UserError, match="global_batch_size is 12"):
        partners(order, 4)


@pytest.mark.parametrize("per_example", [False, True])
def test_mixup(per_example):
    images, labels = run(0, mixup_alpha=0.8, per_example=per_example)
    share = own_share(labels)
    assert len(np.unique(share)) == (8 if per_example else 1)
    weight = share[:, None, None, None]
    np.testing.assert_allclose(images, weight * IMAGES + (1 - weight) * IMAGES[PAIRED], atol=1e-6)
    np.testing.assert_allclose(labels, share[:, None] * ONE_HOT + (1 - share[:, None]) * ONE_HOT[PAIRED], atol=1e-6)


def test_cutmix_labels_are_the_share_of_pixels():
    images, labels = run(3, cutmix_alpha=1.0, per_example=True)
    own = (images == IMAGES).all(axis=-1)
    other = (images == IMAGES[PAIRED]).all(axis=-1)
    assert (own ^ other).all()
    np.testing.assert_allclose(own_share(labels), own.mean(axis=(1, 2)), atol=1e-6)
    assert other.any()
    for pixels in other:
        rows, columns = np.nonzero(pixels)
        if len(rows):  # what came from the partner fills a rectangle
            assert pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_boxes_follow_timms_arithmetic():
    rng = np.random.default_rng(1)
    shares, centres = rng.uniform(size=50).astype(np.float32), rng.integers(0, (12, 10), size=(50, 2))
    boxes, outside = jax.jit(functools.partial(cut_boxes, height=12, width=10))(
        jnp.asarray(centres), jnp.asarray(shares)
    )
    for box, left_over, share, (row, column) in zip(boxes, outside, shares, centres, strict=True):
        ratio = np.sqrt(1 - share)
        cut_height, cut_width = int(12 * ratio), int(10 * ratio)
        top, bottom = np.clip([row - cut_height // 2, row + cut_height // 2], 0, 12)
        left, right = np.clip([column - cut_width // 2, column + cut_width // 2], 0, 10)
        assert box.tolist() == [top, left, bottom - top, right - left]
        assert float(left_over) == pytest.approx(1 - (bottom - top) * (right - left) / 120)


def test_switch_and_probability():
    run_jitted = jax.jit(
        lambda key: mix(
            jnp.asarray(IMAGES),
            jnp.asarray(LABELS),
            key,
            num_classes=5,
            mixup_alpha=1.0,
            cutmix_alpha=1.0,
            probability=0.6,
            cutmix_share=0.3,
            per_example=True,
        )[0]
    )
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for number in range(60):
        images = np.asarray(run_jitted(jax.random.key(number)))
        from_either = ((images == IMAGES) | (images == IMAGES[PAIRED])).all(axis=(1, 2, 3))
        untouched = (images == IMAGES).all(axis=(1, 2, 3))
        kinds["none"] += int(untouched.sum())
        kinds["cutmix"] += int((from_either & ~untouched).sum())
        kinds["mixup"] += int((~from_either).sum())
    # 480 draws: 0.4 + a few empty boxes, 0.6 * 0.7, 0.6 * 0.3 less the empty boxes
    assert 170 < kinds["none"] < 240
    assert 165 < kinds["mixup"] < 240
    assert 45 < kinds["cutmix"] < 115


def test_mixups_share_has_the_beta_distributions_moments():
    keys = jax.random.split(jax.random.key(9), 4)
    step = jax.jit(
        lambda key: mix(
            jnp.zeros((512, 1, 1, 1)),
            jnp.arange(512) % 2,
            key,
            num_classes=2,
            mixup_alpha=0.2,
            per_example=True,
        )[1]
    )
    share = np.concatenate([np.asarray(step(key))[np.arange(512), np.arange(512) % 2] for key in keys])
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    assert share.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)


def test_nothing_asked_nothing_mixed():
    images, labels = run(0)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, ONE_HOT)


def test_sharded_batch_is_mixed_alike_and_pairs_stay_on_their_device():
    images = jnp.asarray(np.random.default_rng(2).normal(size=(16, 6, 6, 3)), jnp.float32)
    labels = jnp.arange(16) % 5

    def mixed(images, labels):
        return mix(images, labels, jax.random.key(3), num_classes=5, cutmix_alpha=1.0)

    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put((images, labels), over_data)
    compiled = jax.jit(mixed, out_shardings=over_data).lower(*placed).compile()
    for ours, alone in zip(compiled(*placed), jax.jit(mixed)(images, labels), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-6)
    program = compiled.as_text()
    for collective in (" all-gather", " all-to-all", " collective-permute", " all-reduce"):
        assert not [line for line in program.splitlines() if collective in line and "6,6,3" in line]
