"""Parameters that stand still, by pattern."""

import jax.numpy as jnp

from densenet_jax.training.freeze import frozen_mask

PARAMS = {
    "norm0": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
    "denseblock1": {"denselayer1": {"norm1": {"scale": jnp.ones(2)}, "conv1": {"kernel": jnp.ones((2, 2))}}},
    "norm5": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
}
PATTERN = "^params/(norm0|denseblock1)/"


def test_parameters_by_pattern():
    assert frozen_mask(PARAMS, PATTERN) == {
        "norm0": {"scale": True, "bias": True},
        "denseblock1": {"denselayer1": {"norm1": {"scale": True}, "conv1": {"kernel": True}}},
        "norm5": {"scale": False, "bias": False},
    }
