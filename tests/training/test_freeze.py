"""Running statistics follow the parameters that they belong to."""

import jax.numpy as jnp

from densenet_jax.training.freeze import frozen_mask, frozen_statistics_mask, keep_frozen

PARAMS = {
    "norm0": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
    "denseblock1": {"denselayer1": {"norm1": {"scale": jnp.ones(2)}, "conv1": {"kernel": jnp.ones((2, 2))}}},
    "norm5": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
}
STATISTICS = {
    "norm0": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    "denseblock1": {"denselayer1": {"norm1": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}},
    "norm5": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
}
PATTERN = "^params/(norm0|denseblock1)/"


def test_parameters_by_pattern():
    assert frozen_mask(PARAMS, PATTERN) == {
        "norm0": {"scale": True, "bias": True},
        "denseblock1": {"denselayer1": {"norm1": {"scale": True}, "conv1": {"kernel": True}}},
        "norm5": {"scale": False, "bias": False},
    }


def test_statistics_are_frozen_with_their_scale():
    mask = frozen_statistics_mask(STATISTICS, PATTERN)
    assert mask == {
        "norm0": {"mean": True, "var": True},
        "denseblock1": {"denselayer1": {"norm1": {"mean": True, "var": True}}},
        "norm5": {"mean": False, "var": False},
    }
    assert not any(frozen_statistics_mask(STATISTICS, "kernel$")["norm0"].values())
    assert not any(frozen_statistics_mask(STATISTICS, "")["norm0"].values())
    new = {"norm0": {"mean": 1, "var": 1}, "denseblock1": {"denselayer1": {"norm1": {"mean": 1, "var": 1}}}}
    new["norm5"] = {"mean": 1, "var": 1}
    kept = keep_frozen(mask, STATISTICS, new)
    assert kept["norm5"] == {"mean": 1, "var": 1}
    assert kept["norm0"]["mean"] is STATISTICS["norm0"]["mean"]
    assert kept["denseblock1"]["denselayer1"]["norm1"]["var"] is not new["norm0"]["var"]
