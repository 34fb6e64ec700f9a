"""Mixup and cutmix against the definitions in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from densenet_jax.augment.mixup import cut_boxes, mix, partners
from densenet_jax.errors import UserError

SIZE = 16
IMAGES = np.random.default_rng(0).normal(size=(SIZE, 12, 10, 3)).astype(np.float32)
LABELS = np.arange(SIZE) % 5
ONE_HOT = np.eye(5)[LABELS]
PAIRED = np.arange(SIZE) ^ 1


def mixed_by(**settings):
    def step(images, labels, key):
        return mix(images, labels, key, num_classes=5, **settings)

    return step


def own_share(labels):
    """The share of its own label that each example kept; the partner has the rest."""
    share = np.asarray(labels)[..., np.arange(SIZE), LABELS]
    np.testing.assert_allclose(labels, share[..., None] * ONE_HOT + (1 - share[..., None]) * ONE_HOT[PAIRED], atol=1e-6)
    return share


def test_partners_change_places_in_blocks():
    order = jnp.arange(12)
    assert partners(order).tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
    assert partners(order, 3).tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    with pytest.raises(UserError, match="global_batch_size is 12"):
        partners(order, 4)


@pytest.fixture(scope="module")
def per_example():
    """Images and labels of 30 steps, everything drawn for each example."""
    step = jax.jit(mixed_by(mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.6, cutmix_share=0.3, per_example=True))
    runs = [step(IMAGES, jnp.asarray(LABELS), jax.random.key(number)) for number in range(30)]
    return [(np.asarray(images), np.asarray(labels)) for images, labels in runs]


def test_each_example_is_mixup_or_cutmix_or_nothing_in_the_asked_shares(per_example):
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for images, labels in per_example:
        share = own_share(labels)
        own, other = (images == IMAGES).all(axis=-1), (images == IMAGES[PAIRED]).all(axis=-1)
        for index in range(SIZE):
            if own[index].all():
                kinds["none"] += 1
                assert share[index] == 1.0
            elif (own[index] | other[index]).all():
                kinds["cutmix"] += 1
                assert share[index] == pytest.approx(own[index].mean(), abs=1e-6)
                rows, columns = np.nonzero(other[index])  # what came from the partner fills a rectangle
                assert other[index][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            else:
                kinds["mixup"] += 1
                expected = share[index] * IMAGES[index] + (1 - share[index]) * IMAGES[PAIRED[index]]
                np.testing.assert_allclose(images[index], expected, atol=1e-6)
    # 480 draws: 0.4 and a few empty boxes, 0.6 * 0.7, 0.6 * 0.3 less the empty boxes
    assert 170 < kinds["none"] < 240
    assert 165 < kinds["mixup"] < 240
    assert 45 < kinds["cutmix"] < 115


def test_one_share_a_batch_with_the_beta_distributions_moments():
    keys = jax.random.split(jax.random.key(9), 1000)
    steps = jax.jit(jax.vmap(mixed_by(mixup_alpha=0.2), in_axes=(None, None, 0)))
    images, labels = map(np.asarray, steps(IMAGES[:, :1, :1], jnp.asarray(LABELS), keys))
    share = own_share(labels)
    np.testing.assert_array_equal(share, np.broadcast_to(share[:, :1], share.shape))
    share = share[:, 0]
    assert share.mean() == pytest.approx(0.5, abs=0.04)
    assert share.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.012)
    weight = share[:10, None, None, None, None]
    expected = weight * IMAGES[:, :1, :1] + (1 - weight) * IMAGES[PAIRED, :1, :1]
    np.testing.assert_allclose(images[:10], expected, atol=1e-6)


def test_boxes_follow_timms_arithmetic():
    rng = np.random.default_rng(1)
    shares, centers = rng.uniform(size=50).astype(np.float32), rng.integers(0, (12, 10), size=(50, 2))
    boxes, outside = jax.jit(functools.partial(cut_boxes, height=12, width=10))(
        jnp.asarray(centers), jnp.asarray(shares)
    )
    for box, left_over, share, (row, column) in zip(boxes, outside, shares, centers, strict=True):
        ratio = np.sqrt(1 - share)
        cut_height, cut_width = int(12 * ratio), int(10 * ratio)
        top, bottom = np.clip([row - cut_height // 2, row + cut_height // 2], 0, 12)
        left, right = np.clip([column - cut_width // 2, column + cut_width // 2], 0, 10)
        assert box.tolist() == [top, left, bottom - top, right - left]
        assert float(left_over) == pytest.approx(1 - (bottom - top) * (right - left) / 120)


def test_nothing_asked_nothing_mixed():
    images, labels = mixed_by()(jnp.asarray(IMAGES), jnp.asarray(LABELS), jax.random.key(0))
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, ONE_HOT)


def test_sharded_batch_is_mixed_alike_and_pairs_stay_on_their_device():
    step = mixed_by(cutmix_alpha=1.0)
    arguments = (IMAGES, jnp.asarray(LABELS), jax.random.key(3))
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    placed = (*jax.device_put(arguments[:2], over_data), arguments[2])
    compiled = jax.jit(step, out_shardings=over_data).lower(*placed).compile()
    for ours, alone in zip(compiled(*placed), jax.jit(step)(*arguments), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-6)
    assert not (np.asarray(compiled(*placed)[0]) == IMAGES).all()
    lines = compiled.as_text().splitlines()
    for collective in (" all-gather", " all-to-all", " collective-permute", " all-reduce"):
        assert not [line for line in lines if collective in line and ",12,10,3]" in line]


@pytest.mark.parametrize("settings", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}])
def test_many_labels_are_mixed_one_by_one_and_an_unknown_one_stays_unknown(settings):
    labels = jnp.asarray(np.random.default_rng(1).choice(np.float32([0, 1, np.nan]), (SIZE, 5)))
    images, key = jnp.asarray(IMAGES), jax.random.key(0)
    share = own_share(mixed_by(**settings)(images, jnp.asarray(LABELS), key)[1])[:, None]
    assert 0 < share.min() <= share.max() < 1
    _, mixed = mixed_by(**settings)(images, labels, key)
    np.testing.assert_allclose(mixed, share * labels + (1 - share) * labels[PAIRED], atol=1e-6)
    _, unmixed = mixed_by(**settings, probability=0.0)(images, labels, key)
    np.testing.assert_array_equal(unmixed, labels)
