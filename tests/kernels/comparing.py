"""What the tests of kernels for GPUs and TPUs share."""

import json
import os
import subprocess
import sys

import numpy as np

from densenet_jax.plan import compilers
from tests.running import ROOT


def assert_close(found, expected, tolerance):
    """Equal shapes and dtypes, and values within a tolerance relative to each array's largest."""
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=0) + 1e-30


def compile_for_absent_chips(program):
    """Runs a program in a process that has the compilers' environment; what it prints last, which is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | compilers.ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
