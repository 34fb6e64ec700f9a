"""What the tests of kernels for GPUs and TPUs share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def make_draw(dtype, seed=0):
    """A function of sides that draws normal numbers of a dtype, other ones each time, and compiles nothing."""
    chance = np.random.default_rng(seed)
    return lambda *sides, kind=dtype: jnp.asarray(chance.standard_normal(sides).astype(kind))


def run_reference(operation, *operands, **options):
    """Returns what the reference gives, compiled as one program."""
    return jax.jit(functools.partial(operation.reference, **options))(*operands)


def run_kernel(operation, *operands, **options):
    """Returns what the kernel gives when it is interpreted, compiled as one program."""
    return jax.jit(functools.partial(operation.kernel, **options, interpret=True))(*operands)


def assert_close(actual, expected, tolerance):
    """Equal shapes and dtypes, and values within a tolerance relative to each array's largest."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=0) + 1e-30
