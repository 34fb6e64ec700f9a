"""Every test sees eight CPU devices, checked shapes, and no silent rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - the hook below looks it up by name

# Before anything of ours is imported: from here on the shapes in signatures are checked at every call.
install_import_hook(["densenet_jax.models", "densenet_jax.training"], "tests.typecheck.checked")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# What takes time here is the compiler, not the programs: a fifth of the time without its expensive passes.
jax.config.update("jax_disable_most_optimizations", True)

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def user(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a user whose data sets and compiled programs last as long as the test session.

    All workers of the session are one user: what one of them has compiled, the others read.
    """
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "user"
    home.mkdir(exist_ok=True)
    return {"TFDS_DATA_DIR": str(home / "datasets"), "XDG_CACHE_HOME": str(home / "cache")}
