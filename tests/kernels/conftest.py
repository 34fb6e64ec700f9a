"""The CPU's kernels, compiled once for all tests of a run from the sources as they are."""

import fcntl
import os

import pytest

from densenet_jax.kernels.cpu import build, library, primitive


@pytest.fixture(scope="session")
def compiled_path(shared_folder):
    path = shared_folder / "densenet_cpu-test.so"
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "library_paths", lambda: [path])
    patch.setenv("CXXFLAGS", os.environ.get("CXXFLAGS", "-Og"))  # compiled in a third of the time
    patch.delenv("LD_PRELOAD", raising=False)  # the compiler runs without this process's sanitizers, quicker
    try:
        with open(shared_folder / "densenet_cpu.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return path if path.exists() else build.build()
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
    forget_library()
    assert primitive.is_available()
    yield
    patch.undo()
    forget_library()


def forget_library():
    """Has the library looked for again, by every function that keeps what it found."""
    for cached in (library.target_names, library.vector_bytes, library.bfloat16_products, library.int8_products):
        cached.cache_clear()
