"""Elementwise operations on many arrays are one call of the CPU's kernels. Skipped where there is no compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from densenet_jax.kernels.cpu import elementwise, primitive
from densenet_jax.training.ema import ema_decay, update_ema
from densenet_jax.training.nonfinite import not_finite
from densenet_jax.training.optimizer import make_optimizer
from tests.kernels.test_cpu import assert_same, draw, uses_kernels

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


OPTIMIZERS = [
    ("sgd", {"weight_decay": 1e-2, "decay_norm_and_bias": False}, 2),
    ("sgd", {"weight_decay": 1e-2, "freeze": "kernel", "nesterov": False, "clip_grad_norm": 1.0}, None),
    ("adamw", {"weight_decay": 1e-2, "layer_decay": 0.5}, 1),
    ("rmsprop", {"rate_multipliers": (("bias", 0.5),)}, 2),
    ("lamb", {"weight_decay": 1e-2}, None),
]


@pytest.mark.parametrize(("name", "options", "calls"), OPTIMIZERS)
def test_parameters_are_updated_in_few_calls(name, options, calls):
    """By the optimizer's own operations, into the memory of the old ones, with their moving average."""
    params = {"norm": {"scale": draw(70), "bias": draw(3)}, "conv": {"kernel": draw(3, 3, 90, 50, seed=1)}}
    optimizer = make_optimizer(name, lambda step: 0.1 / (1 + step), **options)

    def update(state, gradients, step):
        params, opt_state, average = state
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, update_ema(average, params, ema_decay(step, 0.9))

    state = (params, optimizer.init(params), jax.tree.map(jnp.copy, params))
    gradients = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=2), params)
    in_place = jax.jit(functools.partial(elementwise.update_in_place, update), donate_argnums=0)
    expected = state
    for step in range(3):
        expected = jax.jit(update)(expected, gradients, step)
    computed = jax.tree.map(jnp.copy, state)
    program = in_place.lower(computed, gradients, 0).compile().as_text()
    if calls is not None:
        assert " copy(f64[3,3" not in program
        assert program.count('custom_call_target="densenet_elementwise') == calls
    for step in range(3):
        computed = in_place(computed, gradients, step)
    assert_same(computed, expected, 1e-13)
    with primitive.plain_kernels():
        assert "densenet" not in str(
            jax.make_jaxpr(lambda s: elementwise.update_in_place(update, s, gradients, 0))(state)
        )
    spread = jax.jit(functools.partial(elementwise.update_in_place, update), out_shardings=everywhere())
    placed = jax.device_put((state, gradients), everywhere())
    assert "custom-call" not in spread.lower(*placed, 0).compile().as_text()
    assert_same(spread(*placed, 0), jax.jit(update)(state, gradients, 0), 1e-13)


def everywhere():
    return NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec())


def test_fronts_of_vectors_are_computed_in_place():
    items = [(draw(9), draw(5, seed=1), draw(7, seed=2)), (draw(4, seed=3), draw(4, seed=4), draw(8, seed=5))]

    def function(items):
        return elementwise.map_fronts(lambda a, b, c: 0.5 * a + b * c, items)

    expected = [a.at[: b.size].set(0.5 * a[: b.size] + b * c[: b.size]) for a, b, c in items]
    assert uses_kernels(function, items)
    assert_same(jax.jit(function)(items), expected, 1e-15)
    assert_same(jax.jit(function)(jax.device_put(items, everywhere())), expected, 1e-15)


def _mean_and_rest(total, squares):
    mean = total / 9
    return mean, 1 / jnp.sqrt(jnp.maximum(squares / 9 - mean**2, 0) + 1e-5)


@pytest.mark.parametrize("shape", [(1, 40), (5000,)])
def test_an_elementwise_function_is_one_call(shape):
    vectors = draw(*shape), 9 + jnp.square(draw(*shape, seed=1))
    function = functools.partial(elementwise.compute, _mean_and_rest)
    expected = jax.jit(_mean_and_rest)(*vectors)
    program = jax.jit(lambda *v: tuple(function(*v))).lower(*vectors).compile().as_text()
    assert program.count("custom-call(") == 1
    assert "sqrt" not in program
    assert_same(jax.jit(function)(*vectors), expected, 1e-14)
    assert_same(jax.jit(function)(*jax.device_put(vectors, everywhere())), expected, 1e-14)
    with primitive.plain_kernels():
        assert_same(jax.jit(lambda *v: function(*v))(*vectors), expected, 0)
    mixed = vectors[0], vectors[1][..., :1]
    assert_same(jax.jit(function)(*mixed), jax.jit(_mean_and_rest)(*mixed), 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_squares_are_summed_in_one_call(dtype):
    arrays = [draw(*shape).astype(dtype) for shape in ((3, 90, 501), (1,), (0,), (40,))]
    arrays.append(jnp.full((70,), jnp.inf, dtype))
    sums = jax.jit(elementwise.square_sums)(arrays)
    assert uses_kernels(elementwise.square_sums, arrays)
    expected = [jnp.sum(jnp.square(array)) for array in arrays]
    np.testing.assert_allclose(sums, expected, rtol=1e-5 if dtype == jnp.float32 else 1e-12)
    assert not_finite(arrays).tolist() == [False] * 4 + [True]
