"""Makes the same networks in PyTorch: timm's where it has them, and the DenseNet paper's small ones.

torchvision, which timm imports, registers shapes for compiled operators that a CPU build of torch lacks; nothing here
needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_register_fake = torch.library.register_fake


def _skip_torchvision(name: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(name, str) and name.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(name, *args, **kwargs)


torch.library.register_fake = _skip_torchvision

import timm  # noqa: E402
from timm.models.densenet import DenseNet  # noqa: E402


class Layer(nn.Module):
    """Norm, ReLU, convolution, once or twice, concatenated to its input."""

    def __init__(self, width: int, growth_rate: int, bottleneck_width: int) -> None:
        super().__init__()
        inner = bottleneck_width * growth_rate
        parts: list[nn.Module] = []
        if inner:
            parts = [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, inner, 1, bias=False)]
        last = inner or width
        parts += [nn.BatchNorm2d(last), nn.ReLU(inplace=True), nn.Conv2d(last, growth_rate, 3, padding=1, bias=False)]
        self.new = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenates input and output."""
        return torch.cat([x, self.new(x)], 1)


def small_network(architecture: dict[str, Any], channels: int, num_classes: int) -> nn.Module:
    """Makes a network with the paper's stem for small images: one 3x3 convolution, neither norm nor pooling."""
    growth_rate, sizes = architecture["growth_rate"], architecture["block_sizes"]
    width = architecture["stem_width"] or 2 * growth_rate
    parts: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
    for index, layers in enumerate(sizes, 1):
        for _ in range(layers):
            parts.append(Layer(width, growth_rate, architecture["bottleneck_width"]))
            width += growth_rate
        parts += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if index < len(sizes):
            narrow = int(width * architecture["compression"])
            parts += [nn.Conv2d(width, narrow, 1, bias=False), nn.AvgPool2d(2)]
            width = narrow
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def make_network(model: str, architecture: dict[str, Any], channels: int, num_classes: int) -> nn.Module:
    """Makes the network of a name, from the fields of its architecture where timm has no such name.

    Raises:
        ValueError: there is none.
    """
    if architecture.get("stem") == "cifar":
        return small_network(architecture, channels, num_classes)
    if not architecture["changed"] and timm.is_model(model):
        return timm.create_model(model, num_classes=num_classes, in_chans=channels)
    if "stem" not in architecture or architecture["blur"] != "none":
        raise ValueError(f"there is no {model} in PyTorch to compare with")
    return DenseNet(
        architecture["growth_rate"],
        tuple(architecture["block_sizes"]),
        num_classes=num_classes,
        in_chans=channels,
        bn_size=architecture["bottleneck_width"],
        stem_type="" if architecture["stem"] == "plain" else architecture["stem"],
    )
