"""timm and torchvision, importable with a CPU build of torch.

torchvision registers shapes for compiled operators that such a build lacks; nothing here needs them.
"""

import torch

_register_fake = torch.library.register_fake


def _skip_torchvision(name, *args, **kwargs):
    if isinstance(name, str) and name.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(name, *args, **kwargs)


torch.library.register_fake = _skip_torchvision

import timm  # noqa: E402
import torchvision  # noqa: E402

__all__ = ["timm", "torchvision"]
