"""What every process of `tests.forked_main` has imported before it begins: everything of the package, and no device."""

import os

# As main.py does before its imports.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import densenet_jax.modes  # noqa: F401
import tests.forked_main  # noqa: F401
