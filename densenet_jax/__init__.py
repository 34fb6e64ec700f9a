"""DenseNets and Dual Path Networks in JAX and Flax: train, evaluate, adapt and ship them.

import densenet_jax
module = densenet_jax.create_model("densenet121", num_classes=10)
variables = densenet_jax.load_checkpoint("runs/digits")
predictor = densenet_jax.Predictor.from_workdir("runs/digits")
"""

import importlib
import typing

from densenet_jax.version import __version__

if typing.TYPE_CHECKING:
    from densenet_jax.errors import UserError
    from densenet_jax.models.create import create_model
    from densenet_jax.models.pretrained import load_pretrained, save_torch_state_dict
    from densenet_jax.models.variants import list_models
    from densenet_jax.predict.predictor import Predictor
    from densenet_jax.training.restore import load_checkpoint

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

# Imported on first use: the command's --help loads no JAX, and `import densenet_jax` no data libraries.
_MODULES = {
    "Predictor": "predict.predictor",
    "UserError": "errors",
    "create_model": "models.create",
    "list_models": "models.variants",
    "load_checkpoint": "training.restore",
    "load_pretrained": "models.pretrained",
    "save_torch_state_dict": "models.pretrained",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
