"""A folded model is the same function: equality in float64, and the shape of what is left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from densenet_jax.models.fold import fold_batch_norm
from densenet_jax.models.layers import max_pool
from tests.models import golden
from tests.models.golden import SMALL_MODELS

_DUAL_PATH = {"reduction_width": 16, "groups": 4, "dense_increments": (4, 6)}
_RDNET = {"stem_width": 20, "growth_rate": (8, 12), "halved_stages": (1,), "squeeze_excite_from": 1}
MODELS = {
    "small_densenet": ("densenet121", {"growth_rate": 16, "block_sizes": (2, 1)}),
    "small_densenet_blur": SMALL_MODELS["small_densenet_blur"],
    "small_dpn": ("dpn68", {**_DUAL_PATH, "block_sizes": (1, 2)}),
    "small_dpn_b": ("dpn48b", {**_DUAL_PATH, "stem_width": 6, "block_sizes": (2, 1)}),
    "small_rdnet": ("rdnet_tiny", {**_RDNET, "block_sizes": (2, 1)}),
    "small_cifar": ("densenet_40_12", {"block_sizes": (2, 2)}),
    "small_cifar_bc": ("densenet_bc_100_12", {"block_sizes": (2, 2)}),
    "small_test_time_pool": ("densenet121", {"growth_rate": 4, "block_sizes": (1, 1), "test_time_pool_px": 3}),
}
# Norms that only read a convolution's output; the others keep a scale.
TAKEN_IN = {
    "small_densenet": 1 + 3,
    "small_densenet_blur": 3 + 4,
    "small_dpn": 1 + 2 * 3,
    "small_dpn_b": 1 + 2 * 3,
    "small_rdnet": 0,
    "small_cifar": 0,
    "small_cifar_bc": 4,
    "small_test_time_pool": 1 + 2,
}


@functools.cache
def shapes_of(name):
    base, architecture = MODELS[name]
    return golden.trace_variables(create_model(base, num_classes=7, **architecture), side_px=33)


def drawn(name, dtype):
    """A small model with weights and statistics of which none is at its neutral value."""
    base, architecture = MODELS[name]
    model = create_model(base, num_classes=7, **architecture, dtype=dtype, param_dtype=dtype)
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        if path[-1].key == "var":
            return rng.uniform(0.3, 2.0, leaf.shape).astype(dtype)
        spread = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        return rng.normal(1.0 if path[-1].key == "scale" else 0.0, spread, leaf.shape).astype(dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes_of(name))


@pytest.mark.parametrize("name", list(MODELS))
def test_folded_is_equal_in_float64(name):
    with jax.enable_x64(True):
        model, variables = drawn(name, np.float64)
        folded, params = fold_batch_norm(model, variables)
        images = np.random.default_rng(4).normal(0, 1, (2, 33, 33, 3))
        expected, actual = jax.jit(model.apply)(variables, images), jax.jit(folded.apply)(params, images)
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", list(MODELS))
def test_the_folded_variables_are_those_of_the_folded_module(name):
    model, variables = drawn(name, np.float32)
    folded, params = fold_batch_norm(model, variables)
    own = jax.eval_shape(lambda key: folded.init(key, jnp.zeros((1, 33, 33, 3))), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), own) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
    before, after = (traverse_util.flatten_dict(tree["params"], sep="/") for tree in (variables, params))
    assert len(before) - len(after) == TAKEN_IN[name]
    assert all(name.endswith("/scale") for name in before.keys() - after.keys())


def test_the_models_variables_stay_as_they_are():
    model, variables = drawn("small_densenet", np.float32)
    copy = jax.tree.map(np.copy, variables)
    fold_batch_norm(model, variables)
    jax.tree.map(np.testing.assert_array_equal, variables, copy)


def test_a_folded_model_does_not_train():
    model, variables = drawn("small_dpn_b", np.float32)
    folded, params = fold_batch_norm(model, variables)
    with pytest.raises(UserError, match="can't be trained"):
        folded.apply(params, jnp.zeros((2, 33, 33, 3)), train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side_px", [1, 2, 7, 8])
def test_a_repeated_border_pools_as_padding_does(side_px, stride):
    x = jnp.asarray(np.random.default_rng(5).normal(-3, 1, (2, side_px, side_px + 1, 3)), jnp.float32)
    np.testing.assert_array_equal(max_pool(x, stride, repeat_border=True), max_pool(x, stride))
