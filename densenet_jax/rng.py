"""Randomness as a function of (seed, purpose, step, example): nothing random is ever carried or saved."""

import enum

import jax
from jaxtyping import Array, Int, Key


class Purpose(enum.IntEnum):
    """Uses of random numbers. The values are part of a run's identity: never reuse or reorder them."""

    INIT = 0
    DROPOUT = 1
    FLIP = 2
    PAD_CROP = 3
    COLOR = 4
    ERASE = 5
    RAND_AUGMENT = 6
    MIX = 7
    DROP_PATH = 8


def step_key(seed: int, purpose: Purpose, step: Int[Array, ""] | int) -> Key[Array, ""]:
    """Makes the key of one purpose at one step of the run with this seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(purpose)), step)


def example_keys(key: Key[Array, ""], count: int) -> Key[Array, " b"]:
    """Makes a key for each example of a global batch by its index there: equal on any number of devices."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jax.numpy.arange(count))
