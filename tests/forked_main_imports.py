"""What every process of `tests.forked_main` has imported before it begins: everything of the package, and no device."""

import importlib
import os

# As main.py does before its imports.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

# The modes import these when they run.
_ROOMS = {
    "run": ("calibrate", "metric_writers", "prepare", "train"),
    "report": ("compare", "data", "parameters", "run", "schedule"),
    "training": ("checkpoint",),
    "export": ("export",),
    "plan": ("plan",),
    "serve": ("serve",),
}
for _room, _modules in _ROOMS.items():
    for _module in _modules:
        importlib.import_module(f"densenet_jax.{_room}.{_module}")
# Data sets and pictures are imported where they are first wanted, which takes two seconds more.
_LATE = ("densenet_jax.data.digits", "etils.edc", "matplotlib.backends.backend_agg", "matplotlib.figure")
for _name in ("grain", "scipy.optimize", "densenet_jax.modes", "tests.forked_main", *_LATE):
    importlib.import_module(_name)
