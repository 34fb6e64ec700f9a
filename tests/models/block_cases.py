"""Dense blocks in training, with their options, for comparing implementations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.models.densenet import PLAIN, BlockOptions, DenseBlock
from densenet_jax.models.layers import NormOptions
from densenet_jax.training.sharding import make_mesh, over_data, replicated
from tests.models.comparing import largest_error

CASES = {
    "as it is": {},
    "groups, every convolution dropped from": {"norm": NormOptions(group_size=2), "dropout_rate": 0.3},
    "groups, last convolutions dropped from": {
        "norm": NormOptions(group_size=2),
        "dropout_rate": 0.3,
        "dropout_every_convolution": False,
    },
    "remat": {"remat": True},
    "frozen": {"norm": NormOptions(frozen="norm")},
    "second norms frozen": {"norm": NormOptions(frozen="norm2")},
}


def results(implementation, dtype, options, shardings=None, batch=4, layers=2):
    """(outputs, statistics) and the gradients of parameters and inputs, of a linear loss."""
    options = BlockOptions(dtype=dtype, param_dtype=dtype, **options)
    module = DenseBlock(layers, 4, options=options, implementation=implementation)
    x = jax.random.normal(jax.random.key(0), (batch, 3, 3, 8)).astype(dtype)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, False))
    chance = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: chance.standard_normal(leaf.shape), shapes)
    variables["batch_stats"] = jax.tree.map(lambda leaf: np.abs(leaf) + 0.1, variables["batch_stats"])
    variables = jax.tree.map(lambda leaf, drawn: jnp.asarray(drawn, leaf.dtype), shapes, variables)

    def loss(params, x):
        features, mutated = module.apply(
            {**variables, "params": params}, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)}
        )
        raw = features.raw(1e-5)
        return jnp.sum(raw * jnp.sin(jnp.arange(raw.size)).reshape(raw.shape)), (raw, mutated)

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, outputs), gradients = jax.jit(run, in_shardings=shardings)(variables["params"], x)
    return outputs, gradients


def largest_error_over_eight_devices(fused, group_size):
    """Compares a block in float64 over this process's devices with the plain one on one device."""
    mesh, options = make_mesh(), {"norm": NormOptions(group_size=group_size)}
    shardings = (replicated(mesh), over_data(mesh))
    with jax.enable_x64(True):
        spread = results(dataclasses.replace(fused, mesh=mesh), jnp.float64, options, shardings, batch=16, layers=1)
        return largest_error(spread, results(PLAIN, jnp.float64, options, batch=16, layers=1))
