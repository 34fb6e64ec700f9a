"""A number that is not finite is traced to its part of the model."""

import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.training.nonfinite import describe, leaf_names, not_finite

TREE = {
    "layer10": {"kernel": jnp.ones((2, 3))},
    "layer2": {"bias": jnp.zeros(4), "kernel": jnp.ones((2, 3), jnp.bfloat16)},
}


def test_finite_numbers_are_no_fault():
    flags = not_finite(TREE)
    assert flags.tolist() == [False] * 3
    assert describe("parameters", flags, leaf_names(TREE)) == ""
    assert not_finite({}).shape == (0,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_first_fault_is_named_with_numbers_as_numbers(value):
    faulty = {
        "layer10": {"kernel": TREE["layer10"]["kernel"].at[1, 2].set(value)},
        "layer2": {"bias": TREE["layer2"]["bias"], "kernel": TREE["layer2"]["kernel"].at[0, 0].set(value)},
    }
    flags = not_finite(faulty)
    assert flags.tolist() == [True, False, True]
    assert describe("parameters", flags, leaf_names(TREE)) == "2 of 3 parameters, first layer2/kernel"
