"""Policies by name, and loss scaling that grows, backs off and skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.training import precision
from densenet_jax.training.precision import LossScale, all_finite, get_dtype, select


def test_policies():
    assert get_dtype("bfloat16") == jnp.bfloat16


def test_float64_is_refused_where_jax_would_round_it():
    with pytest.raises(UserError, match="set JAX_ENABLE_X64=1"):
        get_dtype("float64")
    with jax.enable_x64(True):
        assert get_dtype("float64") == jnp.float64


def test_scaling_and_unscaling_round_nothing():
    scale = LossScale.create(2.0**12)
    gradients = {"k": jnp.asarray([1 / 3, -7e-5, 0.0])}
    scaled = jax.tree.map(scale.scale_loss, gradients)
    np.testing.assert_array_equal(scaled["k"], gradients["k"] * 4096)
    np.testing.assert_array_equal(scale.unscale(scaled)["k"], gradients["k"])


def test_scale_grows_backs_off_and_counts(monkeypatch):
    monkeypatch.setattr(precision, "_GROWTH_INTERVAL_STEPS", 3)
    monkeypatch.setattr(precision, "_LARGEST", 2.0**18)
    update = jax.jit(LossScale.update)
    scale, seen = LossScale.create(), []
    for finite in [True, True, True, True, False, True, True, True, True, True, True, True, True, True]:
        scale = update(scale, jnp.asarray(finite))
        seen.append(float(jnp.log2(scale.scale)))
    assert seen == [16, 16, 17, 17, 16, 16, 16, 17, 17, 17, 18, 18, 18, 18]
    assert scale.skipped_steps.item() == 1


def test_scale_never_falls_below_one():
    scale = LossScale.create(2.0)
    for _ in range(5):
        scale = scale.update(jnp.asarray(False))
    assert scale.scale.item() == 1.0
    assert scale.skipped_steps.item() == 5


def test_float16_gradients_that_underflow_survive_with_scaling():
    def loss(weight, scale):
        # The gradient that reaches the float16 product is 2^-28 times the scale; float16 ends at 2^-24.
        product = weight.astype(jnp.float16) * jnp.float16(1.0)
        return product.astype(jnp.float32) * 2.0**-28 * scale

    tiny = jax.grad(loss)
    assert tiny(jnp.asarray(1.0), 1.0).item() == 0.0
    scale = LossScale.create(2.0**16)
    assert scale.unscale(tiny(jnp.asarray(1.0), scale.scale)).item() == 2.0**-28


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_keeps_the_old_state(bad):
    good = {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2))}}
    broken = {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2)).at[1, 0].set(bad)}}
    assert all_finite(good).item()
    assert not all_finite(broken).item()
    kept = select(all_finite(broken), broken, good)
    jax.tree.map(np.testing.assert_array_equal, kept, good)
