"""DenseNets and Dual Path Networks in JAX and Flax: train, evaluate, adapt and ship them.

import densenet_jax
module = densenet_jax.create_model("densenet121", num_classes=10)
variables = densenet_jax.load_checkpoint("runs/digits")
predictor = densenet_jax.Predictor.from_workdir("runs/digits")
"""

import importlib
import typing

from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from densenet_jax.models.pretrained import load_pretrained, save_torch_state_dict
from densenet_jax.models.variants import list_models
from densenet_jax.training.checkpoint import load_checkpoint
from densenet_jax.version import __version__

if typing.TYPE_CHECKING:
    from densenet_jax.predict.predictor import Predictor

__all__ = [
    "Predictor",
    "UserError",
    "__version__",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_pretrained",
    "save_torch_state_dict",
]

_ON_FIRST_USE = {"Predictor": "densenet_jax.predict.predictor"}  # they load data libraries, which the import may not


def __getattr__(name: str) -> typing.Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
