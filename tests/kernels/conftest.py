"""The CPU's kernels, compiled once for all tests of a run from the sources as they are."""

import os

import pytest

from densenet_jax.kernels.cpu import build, library, primitive


@pytest.fixture(scope="session")
def compiled_path(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    path = tmp_path_factory.mktemp("native") / f"densenet_cpu-test{os.getpid()}.so"
    patch.setattr(build, "library_paths", lambda: [path])
    patch.setenv("CXXFLAGS", os.environ.get("CXXFLAGS", "-O1"))  # compiled in half the time
    try:
        return build.build()
    except RuntimeError as error:
        pytest.skip(f"the library can't be compiled here: {error}")
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def compiled(compiled_path):
    """Uses that library."""
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "library_paths", lambda: [compiled_path])
    patch.delenv("DENSENET_JAX_NATIVE", raising=False)
    library.target_names.cache_clear()
    assert primitive.is_available()
    yield
    patch.undo()
    library.target_names.cache_clear()
