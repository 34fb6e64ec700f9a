"""Cross entropy against the definition written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.training.losses import balanced_weights, cross_entropy, make_loss

compiled_cross_entropy = jax.jit(cross_entropy, static_argnums=2)


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
    losses = compiled_cross_entropy(logits.astype(np.float32), labels, smoothing)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, by_definition(logits, targets), rtol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_probabilities(logits, smoothing):
    labels = np.random.default_rng(1).dirichlet(np.ones(7), size=6)
    losses = compiled_cross_entropy(logits.astype(np.float32), labels.astype(np.float32), smoothing)
    targets = labels * (1 - smoothing) + smoothing / 7
    np.testing.assert_allclose(losses, by_definition(logits, targets), rtol=2e-6)


def test_half_precision_logits_lose_nothing_in_the_loss(logits):
    half = logits.astype(jnp.bfloat16)
    labels = np.arange(6)
    losses = compiled_cross_entropy(half, labels)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, compiled_cross_entropy(half.astype(np.float32), labels))


@pytest.mark.parametrize("label", [7, -1])
def test_a_class_number_that_does_not_exist_is_not_a_quiet_zero(logits, label):
    losses = np.asarray(compiled_cross_entropy(logits.astype(np.float32), np.array([label, 0, 0, 0, 0, 0])))
    assert np.isnan(losses[0])
    assert np.isfinite(losses[1:]).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_classes_as_torch_defines_them(logits, smoothing):
    weights = np.array([0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 1.0])
    labels = np.array([0, 6, 3, 3, 1, 5])
    loss = make_loss("softmax", label_smoothing=smoothing, class_weights=tuple(weights))
    targets = np.eye(7)[labels] * (1 - smoothing) + smoothing / 7
    expected = by_definition(logits, targets * weights).sum() / weights[labels].sum()

    @jax.jit
    def compute(given, same):
        losses = loss(given, same)
        return losses.sum() / loss.divisor(same), loss.sums(given, same, losses)

    for same in (labels, np.eye(7, dtype=np.float32)[labels]):
        mean, sums = compute(logits.astype(np.float32), same)
        assert float(mean) == pytest.approx(expected, rel=1e-6)
        assert sums.compute()["loss"] == pytest.approx(expected, rel=1e-6)


def label_losses(logits, targets, weights, first, second, margin, smoothing):
    """arXiv:2009.14119, equations 4 to 7, with weights of the positives; 0 where a label is unknown."""
    probability = 1 / (1 + np.exp(-logits))
    shifted = np.maximum(probability - margin, 0)
    targets = targets * (1 - smoothing) + smoothing / 2
    positive = weights * (1 - probability) ** first * np.log(probability)
    negative = shifted**second * np.log(1 - shifted)
    return np.nan_to_num(-(targets * positive + (1 - targets) * negative))


@pytest.mark.parametrize("weights", [(), (1.0, 5.0, 0.2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_binary_loss_of_one_class(weights, mixed):
    logits = np.array([[0.3, -2.0, 40.0], [1.5, 0.0, -0.7]])
    one_hot = np.array([[0.0, 0.0, 1.0], [0.3, 0.7, 0.0]] if mixed else [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    loss = make_loss("binary", label_smoothing=0.1, class_weights=weights)
    targets = jnp.asarray(one_hot if mixed else [2, 1])
    q, p = one_hot * 0.9 + 0.1 / 3, 1 / (1 + np.exp(-logits))
    terms = -(q * np.log(p) + (1 - q) * np.log1p(-np.minimum(p, 1 - 1e-16)))
    terms[0, 2] = (1 - q[0, 2]) * 40.0  # log(1 - sigmoid(40)) is -40
    expected = (terms * (np.array(weights) if weights else 1.0)).mean(axis=-1)
    np.testing.assert_allclose(loss(jnp.asarray(logits), targets), expected, rtol=1e-5)
    assert loss.divisor(targets) is None
    assert np.isnan(loss(jnp.asarray(logits), jnp.asarray([-1, 3]))).all()


LABEL_LOSSES = [
    ("sigmoid", {}, (0, 0, 0)),
    ("focal", {}, (2, 2, 0)),
    ("asymmetric", {"margin": 0.05}, (0, 4, 0.05)),
    ("asymmetric", {"margin": 0.2, "gammas": (1.0, 3.0)}, (1, 3, 0.2)),
]


@pytest.mark.parametrize(("name", "options", "numbers"), LABEL_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_losses_and_their_gradients(logits, name, options, numbers, smoothing):
    chance = np.random.default_rng(2)
    targets = chance.choice([0.0, 1.0, 0.3, np.nan], size=logits.shape)  # 0.3: mixed
    weights = chance.uniform(0.5, 2.0, 7)
    loss = make_loss(name, label_smoothing=smoothing, class_weights=tuple(weights), **options)
    expected = label_losses(logits, targets, weights, *numbers, smoothing)
    with jax.enable_x64(True):
        actual = jax.jit(loss.elements)(logits, targets)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)
        assert loss.divisor(jnp.asarray(targets)) == np.count_nonzero(~np.isnan(targets))
        gradient = jax.jit(jax.grad(lambda logits: jnp.sum(loss(logits, jnp.asarray(targets)))))(logits)
    step = 1e-6
    ends = (label_losses(logits + sign * step, targets, weights, *numbers, smoothing) for sign in (1, -1))
    np.testing.assert_allclose(gradient, np.subtract(*ends) / (2 * step), rtol=1e-6, atol=1e-8)
    assert (np.asarray(gradient)[np.isnan(targets)] == 0).all()


@pytest.mark.parametrize(("name", "options", "numbers"), LABEL_LOSSES)
def test_label_losses_stay_finite_far_out(name, options, numbers):
    logits = np.array([[-500.0, 500.0, -40.0, 40.0, 0.0]] * 3, np.float32)
    targets = jnp.asarray([[0.0] * 5, [1.0] * 5, [np.nan] * 5])
    loss = make_loss(name, **options)
    value, gradient = jax.jit(jax.value_and_grad(lambda logits: jnp.sum(loss(logits, targets))))(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    elements, rounded = jax.jit(loss.elements), logits.astype(jnp.bfloat16)
    half = elements(rounded, targets)
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, elements(rounded.astype(np.float32), targets))


def test_balanced_weights_let_both_sides_count_equally():
    np.testing.assert_allclose(balanced_weights(np.array([0, 0, 0, 1]), 3), [4 / 6, 4 / 2, 1.0])
    labels = np.array([[1, 0, 1], [0, 0, np.nan], [0, np.nan, 1], [0, 0, np.nan]], np.float32)
    assert balanced_weights(labels, 3) == (3.0, 1.0, 1.0)
