"""Steps with many labels an image: unknown ones count nowhere, however the batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from densenet_jax.training import sharding
from densenet_jax.training.eval_step import make_eval_step, make_predict_step
from densenet_jax.training.losses import make_loss
from densenet_jax.training.optimizer import make_optimizer
from densenet_jax.training.schedules import make_schedule
from densenet_jax.training.state import StateRecipe
from densenet_jax.training.steps import TrainStep

BATCH, LABELS, SHAPE = 16, 3, (4, 4, 1)


class Linear(nn.Module):
    """One product with all pixels: no batch norm, so microbatches change nothing."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        self.variable("batch_stats", "none", lambda: jnp.zeros(()))
        return nn.Dense(LABELS, dtype=self.dtype)(images.reshape(images.shape[0], -1))


def batch_of(seed):
    chance = np.random.default_rng(seed)
    labels = chance.choice(np.float32([0, 1, np.nan]), (BATCH, LABELS), p=[0.4, 0.3, 0.3])
    labels[0::4] = np.nan  # a microbatch of four has no known label at all
    return {"image": chance.integers(0, 256, (BATCH, *SHAPE), np.uint8), "label": labels}


def scale(images):
    return images.astype(jnp.float32) / 64.0


def run(devices=1, steps=3, dtype=jnp.float32, batch=batch_of, **options):
    """Returns the state and the summed figures after some steps."""
    schedule = make_schedule("constant", learning_rate=0.05, total_steps=10)
    recipe = StateRecipe(
        Linear(dtype),
        make_optimizer("sgd", schedule, momentum=0.9, nesterov=True, weight_decay=0.0),
        0,
        SHAPE,
        averages=True,
        scales_loss=dtype == jnp.float16,
    )
    mesh = sharding.make_mesh(jax.devices()[:devices])
    options.setdefault("loss", make_loss("sigmoid", label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5)))
    step = TrainStep(
        recipe.model,
        recipe.optimizer,
        lambda images, labels, step: (scale(images).astype(dtype), labels),
        seed=0,
        average_decay=0.9,
        **options,
    )
    compiled = jax.jit(step, out_shardings=sharding.replicated(mesh))
    state, sums = recipe.create(sharding.replicated(mesh)), None
    for number in range(steps):
        state, report = compiled(state, sharding.to_devices(batch(number), mesh))
        sums = report.sums if sums is None else sums.merge(report.sums)
    return jax.device_get(state), sums.compute()


@pytest.fixture(scope="module")
def plain():
    return run()


@pytest.mark.parametrize("options", [{"microbatches": 4}, {"devices": 8}, {"devices": 2, "microbatches": 8}])
def test_parts_and_devices_change_nothing(plain, options):
    state, figures = run(**options)
    assert figures == pytest.approx(plain[1], rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(plain[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_weighted_classes_are_a_mean_over_the_whole_batch_as_well():
    def classes(seed):
        return {**batch_of(seed), "label": np.random.default_rng(seed).integers(0, LABELS, BATCH).astype(np.int32)}

    loss = make_loss("softmax", class_weights=(1.0, 5.0, 0.2))
    (one, figures), (parts, again) = (run(loss=loss, batch=classes, microbatches=count) for count in (1, 4))
    assert again == pytest.approx(figures, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_float16_scales_the_loss_and_follows_float32(plain):
    state, figures = run(dtype=jnp.float16)
    assert figures["loss"] == pytest.approx(plain[1]["loss"], rel=1e-2)
    assert int(state.loss_scale.skipped_steps) == 0
    ours, theirs = (one.average["params"]["Dense_0"]["bias"] for one in (state, plain[0]))
    np.testing.assert_allclose(ours, theirs, atol=1e-2)


def test_a_batch_without_a_known_label_changes_nothing():
    def unknown(seed):
        return {**batch_of(seed), "label": np.full((BATCH, LABELS), np.nan, np.float32)}

    one, (state, figures) = run(steps=1, batch=unknown)[0], run(steps=3, batch=unknown)
    assert figures["loss"] == 0
    assert np.isnan(figures["f1"])
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_counts_known_labels_and_returns_every_example(devices):
    model = Linear()
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step = jax.jit(make_eval_step(model, scale), out_shardings=sharding.replicated(mesh))
    batch = {**batch_of(2), "mask": np.arange(BATCH) < 13}
    part = step(variables, sharding.to_devices(batch, mesh))
    counts, both = jax.device_get((part, part.merge(part)))
    logits = np.asarray(model.apply(variables, scale(batch["image"]), train=False), np.float64)
    np.testing.assert_allclose(counts.rows["logit"], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(counts.rows["label"], batch["label"])
    np.testing.assert_array_equal(counts.rows["mask"], batch["mask"])
    labels = np.where(batch["mask"][:, None], batch["label"], np.nan)
    signs = np.where(labels == 1, -1, 1)
    expected = np.log1p(np.exp(signs * logits))[~np.isnan(labels)].mean()
    predicted, scores = logits >= 0, []
    for label in range(LABELS):
        known = ~np.isnan(labels[:, label])
        present = labels[:, label] == 1
        if 0 < present.sum() < known.sum():
            right = (predicted[:, label] & present).sum()
            scores.append(2 * right / (predicted[known, label].sum() + present.sum()))
    assert np.mean(scores) > 0
    assert counts.sums.compute() == pytest.approx({"loss": expected, "f1": np.mean(scores), "examples": 13}, rel=1e-4)
    assert counts.seen == 13
    assert both.sums.compute() == pytest.approx({**counts.sums.compute(), "examples": 26})
    assert both.rows is None

    answers = make_predict_step(model, scale, many_labels=True)(variables, {"image": jnp.asarray(batch["image"])})
    np.testing.assert_allclose(answers["probability"], 1 / (1 + np.exp(-logits)), rtol=1e-4, atol=1e-6)
