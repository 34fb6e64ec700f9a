"""Cross entropy against the definition written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.training.losses import cross_entropy


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(6, 7)) * 3


def by_definition(logits, targets):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -(targets * log_probabilities).sum(axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_numbers(logits, smoothing):
    labels = np.array([0, 6, 3, 3, 1, 5])
    targets = np.eye(7)[labels] * (1 - smoothing) + smoothing / 7
    losses = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, by_definition(logits, targets), rtol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_probabilities(logits, smoothing):
    labels = np.random.default_rng(1).dirichlet(np.ones(7), size=6)
    losses = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.float32), smoothing)
    targets = labels * (1 - smoothing) + smoothing / 7
    np.testing.assert_allclose(losses, by_definition(logits, targets), rtol=2e-6)


def test_half_precision_logits_lose_nothing_in_the_loss(logits):
    half = jnp.asarray(logits, jnp.bfloat16)
    labels = jnp.arange(6)
    losses = cross_entropy(half, labels)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, cross_entropy(half.astype(jnp.float32), labels))


@pytest.mark.parametrize("label", [7, -1])
def test_a_class_number_that_does_not_exist_is_not_a_quiet_zero(logits, label):
    losses = jax.jit(cross_entropy)(jnp.asarray(logits, jnp.float32), jnp.asarray([label, 0, 0, 0, 0, 0]))
    assert np.isnan(losses[0])
    assert np.isfinite(losses[1:]).all()
