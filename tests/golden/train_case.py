"""The training run that PyTorch and we do alike: weights, batches and settings from numpy alone, nothing stored."""

import zlib

import numpy as np
from sklearn.datasets import load_digits

STEPS = 200
BATCH = 64
CLASSES = 10
EVAL_EVERY_STEPS = 50
GROWTH_RATE, BLOCK_SIZES = 8, (2, 2)
LEARNING_RATE, MILESTONE_STEPS, DECAY_FACTOR = 0.1, (100, 160), 0.1
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 1e-3, 0.1
MEAN, STD = (0.3,), (0.37,)
HELD_OUT = 360


def digits():
    """(images, labels) to train on and held out: uint8[n, 8, 8, 1], the stored 0 to 16 times 15."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) * 15).astype(np.uint8)
    order = np.random.default_rng(1).permutation(len(labels))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def batches(images, labels):
    """One (images, labels) a step, without repetition within an epoch."""
    rng = np.random.default_rng(2)
    per_epoch = len(labels) // BATCH
    for step in range(STEPS):
        if step % per_epoch == 0:
            order = rng.permutation(len(labels))
        chosen = order[step % per_epoch * BATCH :][:BATCH]
        yield images[chosen], labels[chosen]


def initial(key, shape):
    """One state-dict entry in PyTorch's layout, float64 that float32 holds exactly."""
    if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
        return np.ones(shape)
    if len(shape) == 1:
        return np.zeros(shape)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    value = rng.normal(0.0, np.sqrt(2.0 / np.prod(shape[1:])), shape)
    return value.astype(np.float32).astype(np.float64)
