"""Evaluation counts what it says, exactly: padding, crops, allowed classes, several right classes, confusion."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from densenet_jax.training import sharding
from densenet_jax.training.eval_step import EvalSums, make_eval_step, make_predict_step, mean_logits, restrict
from densenet_jax.training.losses import cross_entropy, label_set_cross_entropy
from densenet_jax.training.metrics import best_of_set

BATCH, CLASSES, SHAPE = 16, 7, (4, 4, 1)


class Linear(nn.Module):
    """One product with all pixels, so that mirroring and each crop change the logits."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(CLASSES, dtype=self.dtype)(images.reshape(images.shape[0], -1))


def scale(images):
    return images.astype(jnp.float32) / 64.0


MODEL = Linear()
VARIABLES = MODEL.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)


def logits_of(images):
    weights = VARIABLES["params"]["Dense_0"]
    return scale(images).reshape(len(images), -1) @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])


def batch_of(seed, crops=()):
    chance = np.random.default_rng(seed)
    return {
        "image": chance.integers(0, 256, (BATCH, *crops, *SHAPE), np.uint8),
        "label": chance.integers(0, CLASSES, BATCH).astype(np.int32),
        "mask": chance.uniform(size=BATCH) < 0.8,
    }


def counted(batches, devices=1, **options) -> EvalSums:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(make_eval_step(MODEL, scale, **options), out_shardings=everywhere)
    total = None
    for batch in batches:
        part = step(jax.device_put(VARIABLES, everywhere), sharding.to_devices(batch, mesh))
        total = part if total is None else total.merge(part)
    return jax.device_get(total)


@pytest.mark.parametrize("devices", [1, 8])
def test_counts_and_confusion_over_padded_sharded_batches_equal_a_slow_count(devices):
    batches = [batch_of(seed) for seed in range(3)]
    actual = counted(batches, devices, confusion=True)
    confusion, loss = np.zeros((CLASSES, CLASSES), int), 0.0
    for batch in batches:
        logits = logits_of(batch["image"])
        losses = np.asarray(cross_entropy(jnp.asarray(logits), jnp.asarray(batch["label"])))
        for row, label, mask, one in zip(logits, batch["label"], batch["mask"], losses, strict=True):
            confusion[label, row.argmax()] += mask
            loss += float(one) * mask
    np.testing.assert_array_equal(actual.confusion, confusion)
    assert actual.seen == actual.sums.examples == sum(batch["mask"].sum() for batch in batches)
    assert actual.sums.top1 == np.trace(confusion)
    assert float(actual.sums.loss) == pytest.approx(loss, rel=1e-5)


def test_padding_changes_nothing():
    whole = batch_of(0)
    padded = {name: np.concatenate([array, np.zeros_like(array[:8])]) for name, array in whole.items()}
    expected, actual = counted([whole]), counted([padded])
    assert (actual.seen, actual.sums.top1) == (expected.seen, expected.sums.top1)
    assert float(actual.sums.loss) == pytest.approx(float(expected.sums.loss), rel=1e-6)
    assert actual.confusion is None


def test_ten_crops_are_five_and_their_mirror_images_with_averaged_logits():
    batch = batch_of(1, crops=(5,))
    images = batch["image"]
    both = [logits_of(images[:, crop]) for crop in range(5)]
    both += [logits_of(images[:, crop, :, ::-1]) for crop in range(5)]
    expected = np.mean(both, axis=0)
    apply = jax.jit(lambda images: mean_logits(lambda one: MODEL.apply(VARIABLES, scale(one), train=False), images))
    np.testing.assert_allclose(apply(images), expected, atol=1e-5)
    actual = counted([batch], 8)
    assert actual.sums.top1 == ((expected.argmax(axis=1) == batch["label"]) & batch["mask"]).sum()
    losses = np.asarray(cross_entropy(jnp.asarray(expected), jnp.asarray(batch["label"])))
    assert float(actual.sums.loss) == pytest.approx(losses[batch["mask"]].sum(), rel=1e-4)
    # Not the mean of the probabilities.
    assert np.abs(expected - np.log(np.mean([jax.nn.softmax(one) for one in both], axis=0))).max() > 0.1


def test_only_allowed_classes_are_predicted_and_share_the_probability():
    allowed = (1, 3, 6)
    batch = batch_of(2)
    batch["label"] = np.asarray(allowed, np.int32)[batch["label"] % 3]
    actual = counted([batch], classes=allowed, confusion=True)
    logits = logits_of(batch["image"])[:, allowed]
    right = np.asarray(allowed)[logits.argmax(axis=1)] == batch["label"]
    assert actual.sums.top1 == (right & batch["mask"]).sum()
    assert actual.sums.top5 == actual.seen
    assert actual.confusion.sum() == actual.confusion[np.ix_(allowed, allowed)].sum() == batch["mask"].sum()
    losses = cross_entropy(jnp.asarray(logits), jnp.asarray(np.searchsorted(allowed, batch["label"])))
    assert float(actual.sums.loss) == pytest.approx(float(np.asarray(losses)[batch["mask"]].sum()), rel=1e-5)
    assert counted([batch]).sums.top1 != actual.sums.top1
    assert np.isneginf(restrict(jnp.zeros((1, 3)), (1,))).tolist() == [[True, False, True]]


def test_any_class_of_a_set_is_right_and_an_empty_set_is_left_out():
    batch = batch_of(3)
    sets = np.random.default_rng(3).uniform(size=(BATCH, CLASSES)) < 0.3
    sets[:3] = False
    actual = counted([{**batch, "label_set": sets}], 8)
    logits = logits_of(batch["image"])
    best = np.argsort(-logits, axis=1)
    inside = batch["mask"] & sets.any(axis=1)
    assert 0 < inside.sum() < batch["mask"].sum()
    assert (actual.sums.examples, actual.seen) == (inside.sum(), batch["mask"].sum())
    rows = np.arange(BATCH)
    assert actual.sums.top1 == (sets[rows, best[:, 0]] & inside).sum()
    assert actual.sums.top5 == (np.take_along_axis(sets, best[:, :5], axis=1).any(axis=1) & inside).sum()
    shares = np.asarray(jax.nn.softmax(logits)) * sets
    assert float(actual.sums.loss) == pytest.approx(-np.log(shares.sum(axis=1)[inside]).sum(), rel=1e-5)


def test_a_set_of_one_is_an_ordinary_label():
    logits, labels = jnp.asarray(logits_of(batch_of(4)["image"])), jnp.arange(BATCH) % CLASSES
    one = jax.nn.one_hot(labels, CLASSES, dtype=bool)
    np.testing.assert_allclose(label_set_cross_entropy(logits, one), cross_entropy(logits, labels), rtol=1e-5)
    assert best_of_set(logits, one).tolist() == labels.tolist()


@pytest.mark.parametrize(("crops", "classes"), [((), None), ((5,), None), ((), (1, 4, 6))])
def test_answers_are_those_that_evaluation_counts(crops, classes):
    chance = np.random.default_rng(0)
    batch = {
        "image": chance.integers(0, 256, (BATCH, *crops, *SHAPE), np.uint8),
        "label": chance.choice(classes or CLASSES, BATCH).astype(np.int32),
        "mask": chance.uniform(size=BATCH) < 0.8,
    }
    model = Linear(jnp.bfloat16)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)
    answers = jax.device_get(jax.jit(make_predict_step(model, scale, classes=classes))(variables, batch))
    counts = jax.jit(make_eval_step(model, scale, classes=classes, confusion=True))(variables, batch)

    assert set(answers) == {"probability", "label", "mask"}
    probabilities = answers["probability"]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    allowed = np.isin(np.arange(CLASSES), classes or np.arange(CLASSES))
    assert (probabilities[:, ~allowed] == 0).all()
    confusion = np.zeros((CLASSES, CLASSES), int)
    np.add.at(confusion, (batch["label"][batch["mask"]], probabilities.argmax(axis=1)[batch["mask"]]), 1)
    np.testing.assert_array_equal(counts.confusion, confusion)
    own = probabilities[np.arange(BATCH), batch["label"]][batch["mask"]]
    assert -np.log(own).sum() == pytest.approx(float(counts.sums.loss), rel=2e-3)
