"""Weights, inputs and summaries that the generator and the tests reproduce alike from a seed, with numpy only.

Every array is drawn by a generator seeded by (seed, the state-dict key) and rounded to float32, so that it depends
neither on the order of the keys nor on the framework.
"""

import zlib

import numpy as np

SEED = 20240
SLICE = 48


def generator(key, seed=SEED):
    return np.random.default_rng([seed, zlib.crc32(key.encode())])


def draw(key, shape, seed=SEED):
    """One state-dict entry, float32 in PyTorch's layout.

    Gains are below one, so that biases matter at every depth; no statistic is at its neutral value.
    """
    rng = generator(key, seed)
    if key.endswith("running_var"):
        value = np.exp(rng.uniform(np.log(0.3), np.log(2.0), shape))
    elif key.endswith("running_mean"):
        value = rng.normal(0.0, 0.3, shape)
    elif key.endswith("bias"):
        value = rng.normal(0.1, 0.3, shape)
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.normal(0.0, 1.0 / np.sqrt(np.prod(shape[1:])), shape)
    return value.astype(np.float32)


def draw_images(batch, side_px, seed=SEED):
    """Normalized images float32[b, 3, h, w], in PyTorch's layout."""
    return (
        generator(f"images {batch} {side_px}", seed).normal(0.0, 1.0, (batch, 3, side_px, side_px)).astype(np.float32)
    )


def summarize(array):
    """Sum, sum of magnitudes and some values of an array in PyTorch's layout: float64[2 + at most SLICE]."""
    flat = np.asarray(array, np.float64).reshape(-1)
    chosen = generator(f"slice {flat.size}").choice(flat.size, min(SLICE, flat.size), replace=False)
    return np.concatenate([[flat.sum(), np.abs(flat).sum()], flat[chosen]])


def relative_error(actual, expected):
    """The larger of two errors: of the sum, relative to the sum of magnitudes, and of any value, to the largest."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    sums = np.abs(actual[:2] - expected[:2]).max() / expected[1]
    values = np.abs(actual[2:] - expected[2:]).max() / np.abs(expected[2:]).max()
    error = max(sums, values)
    return error if np.isfinite(error) else np.inf


def key_lines(shapes):
    """A state dict's keys and shapes as sorted text, to be compared or hashed; counters of batches are left out."""
    return "\n".join(
        f"{key} {'x'.join(map(str, shape))}" for key, shape in sorted(shapes.items()) if "num_batches" not in key
    )
