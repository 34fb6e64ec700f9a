"""The moving average against its recurrence written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.training.ema import ema_decay, update_ema


def test_decay_warms_up_to_its_value():
    decays = np.asarray(jax.jit(jax.vmap(lambda t: ema_decay(t, 0.99)))(jnp.arange(2000)))
    expected = np.minimum(0.99, (1 + np.arange(2000)) / (10 + np.arange(2000)))
    np.testing.assert_allclose(decays, expected, rtol=1e-6)
    assert decays[0] == pytest.approx(0.1)


def test_average_of_parameters_and_statistics():
    rng = np.random.default_rng(0)
    trees = [{"params": {"k": rng.normal(size=3)}, "batch_stats": {"m": rng.normal(size=2)}} for _ in range(6)]
    average = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), trees[0])
    expected = trees[0]
    update = jax.jit(lambda average, tree, t: update_ema(average, tree, ema_decay(t, 0.5)))
    for count, tree in enumerate(trees[1:]):
        decay = min(0.5, (1 + count) / (10 + count))
        average = update(average, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree), count)
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, tree)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), average, expected)


def test_an_average_of_equal_values_is_that_value_to_the_bit():
    tree = {"k": jnp.asarray([0.1, 1 / 3, 7e-9])}
    np.testing.assert_array_equal(update_ema(tree, tree, 0.9999)["k"], tree["k"])
