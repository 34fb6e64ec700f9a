"""Tests of what needs an optional extra: left out where it is not installed, except in the gate, which installs all."""

import importlib.util
import os

import pytest


def needs(*modules: str) -> pytest.MarkDecorator:
    """Marks a test as slow and in need of `modules`; the gate runs these (`-m extra`) after installing all extras.

    Where one of them is missing the test is skipped and says so; with DENSENET_JAX_ALL_EXTRAS=1 it fails instead.
    """
    missing = [name for name in modules if importlib.util.find_spec(name.split(".")[0]) is None]
    if missing and os.environ.get("DENSENET_JAX_ALL_EXTRAS") == "1":
        raise ModuleNotFoundError(f"DENSENET_JAX_ALL_EXTRAS is 1, but {missing} can't be imported")

    def mark(test):
        skip = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, which an optional extra installs")
        return pytest.mark.extra(pytest.mark.slow(skip(test)))

    return mark
