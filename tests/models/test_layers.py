"""Convolution, batch norm and pooling against their definitions, written out in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from densenet_jax.models.layers import (
    BatchNorm,
    BatchStats,
    Convolution,
    FeatureMap,
    NormOptions,
    average_pool,
    blur_pool,
    compute_stats,
    convolve,
    dropout,
    global_average_pool,
    he_normal,
    max_pool,
    normalize,
)


def _random(*shape, seed=0, mean=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1.0, shape), jnp.float32)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (7, 2)])
def test_convolution_pads_every_side_alike(size, kernel_size, stride):
    x, kernel = np.asarray(_random(2, size, size, 3)), np.asarray(_random(kernel_size, kernel_size, 3, 4, seed=1))
    pad = kernel_size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel_size, kernel_size), axis=(1, 2))
    expected = np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)
    actual = convolve(jnp.asarray(x), jnp.asarray(kernel), stride=stride, padding=pad)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_pads_every_side_alike(size):
    x = np.asarray(_random(1, size, size, 2)) - 5.0  # negative, so that a padding of zeros would show
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), windows[:, ::2, ::2].max(axis=(-1, -2)))
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), stride=1), windows.max(axis=(-1, -2)))


def test_average_pool_leaves_out_an_odd_border():
    x = np.asarray(_random(1, 5, 4, 1))
    expected = x[:, :4].reshape(1, 2, 2, 2, 2, 1).mean(axis=(2, 4))
    np.testing.assert_allclose(average_pool(jnp.asarray(x)), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [5, 6])
def test_blur_pool_is_the_binomial_filter_over_a_reflected_border(size):
    x = np.asarray(_random(2, size, size, 3))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    actual = blur_pool(jnp.asarray(x))
    assert actual.shape[1:3] == ((size + 1) // 2,) * 2
    np.testing.assert_allclose(actual, (windows * kernel).sum(axis=(-1, -2)), rtol=1e-5, atol=1e-6)


def test_global_average_pool_sums_in_float32():
    x = jnp.full((1, 64, 64, 1), 1.01, jnp.bfloat16)
    assert global_average_pool(x).dtype == jnp.bfloat16
    assert float(global_average_pool(x)[0, 0]) == float(x[0, 0, 0, 0])


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("group_size", [0, 2, 8])
def test_statistics_are_exact_when_the_shift_is_near_the_mean(mean, group_size):
    x = _random(4, 3, 5, 2, mean=mean)
    groups = 2 if group_size == 2 else 1
    rows = np.asarray(x, np.float64).reshape(groups, -1, 2)
    stats = compute_stats(x, group_size, jnp.full(2, mean + 0.5))
    np.testing.assert_allclose(stats.mean, rows.mean(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.var, rows.var(axis=1), rtol=1e-4)


def test_the_shift_has_no_influence_on_gradients():
    x = _random(4, 3, 3, 2)

    @jax.jit
    def loss(x, shift):
        stats = compute_stats(x, 0, shift)
        return jnp.sum(normalize(x, stats, 1e-5) ** 3) + jnp.sum(stats.var * stats.mean)

    zero, one = (jax.grad(loss, argnums=(0, 1))(x, jnp.full(2, shift)) for shift in (0.0, 1.0))
    np.testing.assert_allclose(zero[0], one[0], rtol=1e-3, atol=1e-4)
    assert not np.any(one[1])


def _norm(options=NormOptions(), dtype=jnp.float32):  # noqa: B008
    module = BatchNorm(3, options, dtype)
    variables = {
        "params": {"scale": jnp.array([1.0, 2.0, 0.5]), "bias": jnp.array([0.0, 1.0, -1.0])},
        "batch_stats": {"mean": jnp.array([0.1, 0.2, 0.3]), "var": jnp.array([1.0, 2.0, 3.0])},
    }
    return module, variables


def test_norm_in_evaluation_uses_running_statistics():
    module, variables = _norm(NormOptions(epsilon=0.5))
    x = _random(2, 4, 4, 3)
    expected = (np.asarray(x) - [0.1, 0.2, 0.3]) / np.sqrt(np.array([1.5, 2.5, 3.5])) * [1, 2, 0.5] + [0, 1, -1]
    np.testing.assert_allclose(module.apply(variables, x, train=False), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_norm_in_training_updates_running_statistics(unbiased, momentum):
    module, variables = _norm(NormOptions(momentum=momentum, unbiased_running_variance=unbiased))
    x = _random(2, 2, 2, 3)
    out, state = module.apply(variables, x, train=True, mutable=["batch_stats"])
    rows = np.asarray(x).reshape(-1, 3)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * [1, 2, 0.5] + [0, 1, -1]
    np.testing.assert_allclose(out.reshape(-1, 3), expected, rtol=1e-4, atol=1e-4)
    for key, old, new in (("mean", [0.1, 0.2, 0.3], rows.mean(0)), ("var", [1, 2, 3], rows.var(0, ddof=int(unbiased)))):
        expected = momentum * np.array(old) + (1 - momentum) * new
        np.testing.assert_allclose(state["batch_stats"][key], expected, rtol=1e-5)


def test_groups_of_examples_are_normalized_apart_and_their_statistics_averaged():
    options = NormOptions(group_size=2, momentum=0.0, unbiased_running_variance=False)
    module, variables = _norm(options)
    x = _random(4, 3, 3, 3) * jnp.arange(1.0, 5.0)[:, None, None, None]
    out, state = module.apply(variables, x, train=True, mutable=["batch_stats"])
    alone, _ = _norm(NormOptions())[0].apply(variables, x[:2], train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out[:2], alone, rtol=1e-4, atol=1e-4)
    groups = np.asarray(x).reshape(2, -1, 3)
    np.testing.assert_allclose(state["batch_stats"]["var"], groups.var(axis=1).mean(axis=0), rtol=1e-4)


def test_groups_that_do_not_divide_the_batch_are_refused():
    module, variables = _norm(NormOptions(group_size=3))
    with pytest.raises(UserError, match=r"batch_norm_group_size=3.*4 examples"):
        module.apply(variables, _random(4, 2, 2, 3), train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("group_size", [0, 2])
def test_a_normalized_map_is_read_like_the_raw_one(group_size):
    module, variables = _norm(NormOptions(group_size=group_size))
    x = _random(4, 3, 3, 3, mean=2.0)
    stats = compute_stats(x, group_size, jnp.zeros(3))
    features = FeatureMap(normalize(x, stats, 1e-5), stats)
    expected = module.apply(variables, x, train=True, mutable=["batch_stats"])
    actual = module.apply(variables, features, train=True, mutable=["batch_stats"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)
    np.testing.assert_allclose(features.raw(1e-5), x, rtol=1e-4, atol=1e-4)


def test_bfloat16_statistics_are_float32():
    module, variables = _norm(dtype=jnp.bfloat16)
    x = (_random(8, 16, 16, 3, mean=30.0)).astype(jnp.bfloat16)
    out, state = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    rows = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(
        (state["batch_stats"]["mean"] - 0.9 * jnp.array([0.1, 0.2, 0.3])) * 10, rows.mean(0), 1e-4
    )


@pytest.mark.parametrize(("fan", "count"), [("fan_in", 3 * 3 * 64), ("fan_out", 3 * 3 * 16)])
def test_he_normal_counts_the_fan_that_is_asked_for(fan, count):
    kernel = he_normal(fan)(jax.random.key(0), (3, 3, 64, 16), jnp.float32)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / count), rtol=0.03)
    assert np.abs(kernel).max() > 3 * np.sqrt(2 / count)  # not truncated at two deviations


def test_a_grouped_convolution_sees_its_own_group_only():
    module = Convolution(4, 6, 3, groups=2)
    x = _random(1, 5, 5, 4)
    variables = module.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == (3, 3, 2, 6)
    changed = module.apply(variables, x.at[..., 2:].add(1.0))
    np.testing.assert_array_equal(changed[..., :3], module.apply(variables, x)[..., :3])


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((100, 100))
    out = dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float(out.mean()) - 1) < 0.03
    assert dropout(x, 0.25, None) is x


def test_statistics_broadcast_over_groups():
    x = _random(4, 2, 2, 3)
    stats = BatchStats(jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3)))
    expected = np.asarray(x) - np.repeat(np.arange(6.0).reshape(2, 3), 2, axis=0)[:, None, None]
    np.testing.assert_allclose(normalize(x, stats, 0.0), expected, rtol=1e-5, atol=1e-6)


def test_frozen_norms_use_and_keep_their_running_statistics_in_training():
    model = create_model("densenet_bc_22_12", block_sizes=(1, 1), growth_rate=4, frozen_norms="^params/denseblock1/")
    images = _random(4, 8, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    start = jax.device_get(variables["batch_stats"])
    drawn = jax.tree.map(lambda leaf: np.float32(leaf + 0.5 + np.arange(len(leaf)) / 10), start)
    variables = {"params": variables["params"], "batch_stats": drawn}
    train = functools.partial(jax.jit, static_argnums=0)(
        lambda model, variables: model.apply(variables, images, train=True, mutable=["batch_stats"])
    )
    logits, mutated = train(model, variables)
    for name in ("mean", "var"):
        frozen = [stats["denseblock1"]["denselayer1"]["norm1"][name] for stats in (drawn, mutated["batch_stats"])]
        free = [stats["denseblock2"]["denselayer1"]["norm1"][name] for stats in (drawn, mutated["batch_stats"])]
        np.testing.assert_array_equal(*frozen)
        assert jnp.abs(free[0] - free[1]).max() > 0
    whole = model.clone(norm_options=dataclasses.replace(model.norm_options, frozen="."))
    in_training, _ = train(whole, variables)
    np.testing.assert_allclose(in_training, jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-6)
    assert jnp.abs(in_training - logits).max() > 1e-3
