"""Accumulated gradients equal the large batch's, stay where they are on the devices, and keep the batch's order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from densenet_jax.training.accumulate import accumulate_gradients, join_batch, split_batch

RNG = np.random.default_rng(0)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(48, 5)), jnp.float32),
    "y": jnp.asarray(RNG.normal(size=(48, 2)), jnp.float32),
}
PARAMS = {"w": jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)}
STATISTICS = {"mean": jnp.zeros(5)}


def gradient_function(params, statistics, batch, number):
    """A regression whose statistics are a running mean, as batch norm keeps it."""

    def loss_of(params):
        losses = jnp.sum((batch["x"] @ params["w"] - batch["y"]) ** 2, axis=1)
        return jnp.mean(losses), losses

    gradients, losses = jax.grad(loss_of, has_aux=True)(params)
    statistics = {"mean": 0.9 * statistics["mean"] + 0.1 * jnp.mean(batch["x"], axis=0)}
    return gradients, statistics, {"loss": losses, "number": jnp.full(losses.shape, number)}


def accumulated(count):
    return jax.jit(lambda batch: accumulate_gradients(gradient_function, PARAMS, STATISTICS, batch, count))


@pytest.mark.parametrize("count", [2, 3, 48])
def test_gradients_are_the_large_batchs_and_outputs_in_its_order(count):
    gradients, statistics, outputs = accumulated(count)(BATCH)
    whole_gradients, _, whole = accumulated(1)(BATCH)
    np.testing.assert_allclose(gradients["w"], whole_gradients["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["loss"], whole["loss"], rtol=1e-5)
    np.testing.assert_array_equal(outputs["number"], np.arange(48) % count)
    mean = np.zeros(5)
    for number in range(count):  # once a microbatch, each time by the usual share
        mean = 0.9 * mean + 0.1 * np.asarray(BATCH["x"])[number::count].mean(axis=0)
    np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-4, atol=1e-6)


def test_there_and_back():
    array = jnp.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(split_batch(array, 3)[1, :, 0], [2, 8, 14, 20])
    np.testing.assert_array_equal(join_batch(split_batch(array, 3)), array)


def test_no_example_leaves_its_device():
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(BATCH, over_data)
    compiled = accumulated(3).lower(placed).compile()
    gradients, _, outputs = compiled(placed)
    alone_gradients, _, alone = accumulated(3)(BATCH)
    np.testing.assert_allclose(gradients["w"], alone_gradients["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["loss"], alone["loss"], rtol=1e-5)
    program = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
