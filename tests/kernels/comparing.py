"""What the tests of kernels for GPUs and TPUs share."""

import numpy as np


def assert_close(actual, expected, tolerance):
    """Equal shapes and dtypes, and values within a tolerance relative to each array's largest."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=0) + 1e-30
