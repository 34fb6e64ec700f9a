"""Every test sees eight CPU devices, checked shapes, and no silent rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

# Before anything of ours is imported: from here on the shapes in signatures are checked at every call.
install_import_hook(["densenet_jax.models", "densenet_jax.training"], "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
