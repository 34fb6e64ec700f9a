"""Dense blocks in training, with what can be set of them, for comparing forms."""

import functools

import jax
import jax.numpy as jnp

from densenet_jax.models.dense_block import BlockOptions, DenseBlock, plain_dense_block
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


def results(form, dtype, options, shardings=None, batch=4, layers=2):
    """(outputs, statistics) and the gradients of parameters and inputs, of a linear loss."""
    module = DenseBlock(layers, 4, options=BlockOptions(dtype=dtype, **options), param_dtype=dtype, form=form)
    x = jax.random.normal(jax.random.key(0), (batch, 3, 3, 8)).astype(dtype)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, False))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    variables = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape).astype(leaf.dtype), shapes)
    variables["batch_stats"] = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.1, variables["batch_stats"])

    def loss(params, x):
        features, mutated = module.apply(
            {**variables, "params": params}, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)}
        )
        raw = features.raw(1e-5)
        return jnp.sum(raw * jnp.sin(jnp.arange(raw.size)).reshape(raw.shape)), (raw, mutated)

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, outputs), gradients = jax.jit(run, in_shardings=shardings)(variables["params"], x)
    return outputs, gradients


def largest_error_over_eight_devices(form, group_size):
    """Of a block in float64, over this process's devices in that form and on one in the plain one."""
    mesh, options = make_mesh(), {"norm": NormOptions(group_size=group_size)}
    shardings = (replicated(mesh), over_data(mesh))
    with jax.enable_x64(True):
        found = results(functools.partial(form, mesh=mesh), jnp.float64, options, shardings, batch=16, layers=1)
        return largest_error(found, results(plain_dense_block, jnp.float64, options, batch=16, layers=1))
