"""Trains one network in several implementations and compares the results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.models.create import create_model
from tests.models.golden import trace_variables


def drawn(shapes, seed, dtype):
    """Random values for a tree of shapes; variances and everything else that must be positive is."""
    chance = np.random.default_rng(seed)  # NumPy's, which compiles nothing
    return jax.tree.map(lambda leaf: jnp.asarray(chance.standard_normal(leaf.shape) ** 2 / 4 + 0.1, dtype), shapes)


def signed(leaf):
    """Kernels of both signs; scales too, so that ReLUs close."""
    signs = np.where(np.arange(leaf.size) % 3 == 1, -1, 1).reshape(leaf.shape)
    return jnp.asarray(np.asarray(leaf) * signs, leaf.dtype)


def train(model, variables, images):
    """(logits, statistics) and the gradients of parameters and images, of a linear loss."""

    @jax.jit
    def run(params, images):
        def loss(params, images):
            logits, mutated = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(3)},
            )
            weights = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
            return jnp.sum(logits * weights), (logits, mutated["batch_stats"])

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, images)

    (_, outputs), gradients = run(variables["params"], images)
    return outputs, gradients


def largest_error(actual, expected):
    """Of any leaf, relative to that leaf's largest value."""

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.abs(a - b).max() / (np.abs(b).max() + 1e-30)

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))


def training_case(name, dtype, side_px=6, batch=4, **options):
    """A function from a form's name to what its training gives; all start from the same variables."""
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    make = functools.partial(create_model, name, num_classes=3, dtype=dtype, param_dtype=param_dtype, **options)
    images = jax.random.normal(jax.random.key(0), (batch, side_px, side_px, 3)).astype(dtype)
    shapes = trace_variables(make(), side_px)
    variables = {"params": jax.tree.map(signed, drawn(shapes["params"], 1, param_dtype))}
    variables["batch_stats"] = drawn(shapes["batch_stats"], 2, param_dtype)
    return lambda form: train(make(block_form=form), variables, images)
