"""DenseNets and Dual Path Networks in JAX and Flax: train, evaluate, adapt and ship them.

import densenet_jax
module = densenet_jax.create_model("densenet121", num_classes=10)
variables = densenet_jax.load_checkpoint("runs/digits")
"""

from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from densenet_jax.models.pretrained import load_pretrained, save_torch_state_dict
from densenet_jax.models.variants import list_models
from densenet_jax.training.checkpoint import load_checkpoint
from densenet_jax.version import __version__

__all__ = [
    "UserError",
    "__version__",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_pretrained",
    "save_torch_state_dict",
]
