"""The rearranged stem is the direct one: convolutions up to rounding, maxima and their gradients to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.models.create import create_model
from densenet_jax.models.fused.pooling import max_pool_gradient, max_pool_with_index
from densenet_jax.models.fused.space_to_depth import space_to_depth
from densenet_jax.models.layers import convolve, max_pool
from tests.models.comparing import largest_error

SIZES = [(8, 8), (9, 12), (7, 11), (5, 6), (1, 1), (2, 3)]


def draw(*sizes, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(sizes))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kernel_size", "channels"), [(3, 3), (7, 3), (7, 1), (3, 8)])
def test_a_convolution_over_pixels_in_channels_is_the_strided_one(size, kernel_size, channels):
    with jax.enable_x64(True):
        x, kernel = draw(2, *size, channels), draw(kernel_size, kernel_size, channels, 5, seed=1)
        direct = functools.partial(convolve, stride=2, padding=kernel_size // 2)
        gradient = draw(*jax.eval_shape(direct, x, kernel).shape, seed=2)

        @jax.jit
        def both(x, kernel, gradient):
            results = []
            for function in (lambda x, kernel: convolve(*space_to_depth(x, kernel)), direct):
                out, pullback = jax.vjp(function, x, kernel)
                results.append((out, pullback(gradient)))
            return results

        actual, expected = both(x, kernel, gradient)
        assert actual[0].shape == expected[0].shape
        assert largest_error(actual, expected) < 1e-13


def test_the_units_get_channels_by_eights():
    x, kernel = space_to_depth(draw(1, 8, 8, 3), draw(7, 7, 3, 5))
    assert (x.shape, kernel.shape) == ((1, 7, 7, 16), (4, 4, 16, 5))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_maxima_and_their_gradient_are_xla_s_among_equals_as_well(size, dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, *size, 3)), dtype)  # windows hold the same value twice
    gradient = jnp.asarray(np.random.default_rng(1).integers(-8, 9, jax.eval_shape(max_pool, x).shape), dtype)

    @jax.jit
    def both(x, gradient):
        expected, pullback = jax.vjp(max_pool, x)
        actual, index = max_pool_with_index(x)
        return (actual, max_pool_gradient(index, gradient, *size)), (expected, pullback(gradient)[0])

    jax.tree.map(np.testing.assert_array_equal, *both(x, gradient))


@pytest.mark.parametrize(
    ("name", "size"), [("densenet121", 33), pytest.param("densenet264d", 36, marks=pytest.mark.slow)]
)
def test_a_network_with_it_is_the_plain_one(name, size):
    with jax.enable_x64(True):
        images = draw(2, size, size, 3)
        kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64, "block_sizes": (1, 1), "num_classes": 3}
        results = []
        for form in ("normalize_once_gpu", "plain"):
            model = create_model(name, block_form=form, **kinds)
            shapes = jax.eval_shape(model.init, jax.random.key(0), images)
            chance = np.random.default_rng(1)
            variables = jax.tree.map(
                lambda leaf, chance=chance: jnp.asarray(chance.standard_normal(leaf.shape)), shapes
            )
            variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])

            def loss(params, model=model, variables=variables):
                arrays = {**variables, "params": params}
                logits, new = model.apply(arrays, images, train=True, mutable=["batch_stats"])
                return jnp.sum(logits * jnp.arange(6).reshape(2, 3)), (logits, new)

            def run(params, loss=loss, model=model, variables=variables):
                return jax.value_and_grad(loss, has_aux=True)(params), model.apply(variables, images)

            ((_, outputs), gradients), evaluated = jax.jit(run)(variables["params"])
            results.append((outputs, gradients, evaluated))
        assert largest_error(*results) < 1e-9
