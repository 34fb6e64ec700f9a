"""Counts the least that the training step of a DenseNet or RDNet has to move between a chip and its memory."""

from __future__ import annotations

from densenet_jax.models.rdnet import round_width
from densenet_jax.models.variants import DenseNetArchitecture, RDNetArchitecture, get_variant

# How often a training step has to read or write each kind of array where every pass does all it can:
CONCATENATION = 4  # read forward and backward; the gradient of all features read and written
BOTTLENECK = 6  # written, read; backward read, its gradient written, and both read for the norm's own derivative
NEW_FEATURES = 7  # written, read for their statistics, stored normalized; backward gradient, values read, written, read
JOINED = 3  # a block's whole output for transition or head: read forward and backward, its gradient written
STEM = 5  # the first convolution's output: written, read; backward read, its gradient written, read
INNER = 5  # RDNet, depthwise output and bottleneck: written, read; backward read, its gradient written, read
NEW_PLAIN = 2  # RDNet, output of a layer or transition: written; its gradient read (the concatenation reads the rest)
NEW_GATED = 6  # with squeeze and excite: read for the mean, written scaled; backward gradient and values read again
IMAGE = 2  # read forward, and for the first kernel's gradient


def floor_elements(model: str, image_size_px: int, channels: int = 3) -> int | None:
    """Counts elements moved for one image; None for networks that aren't counted (Dual Path Networks, deep stems)."""
    architecture = get_variant(model).architecture
    if isinstance(architecture, RDNetArchitecture):
        return _rdnet_elements(architecture, image_size_px, channels)
    if not isinstance(architecture, DenseNetArchitecture) or architecture.stem not in ("plain", "cifar"):
        return None
    growth, width = architecture.growth_rate, architecture.stem_width or 2 * architecture.growth_rate
    side, moved = image_size_px, IMAGE * channels * image_size_px**2
    if architecture.stem == "plain":
        side = -(-side // 2)
        moved += STEM * width * side**2
        side = -(-side // 2)
    moved += NEW_FEATURES * width * side**2
    for number, layers in enumerate(architecture.block_sizes):
        for _ in range(layers):
            per_pixel = (
                CONCATENATION * width + BOTTLENECK * architecture.bottleneck_width * growth + NEW_FEATURES * growth
            )
            moved += per_pixel * side**2
            width += growth
        moved += JOINED * width * side**2
        if number < len(architecture.block_sizes) - 1:
            width, side = int(width * architecture.compression), side // 2
            moved += NEW_FEATURES * width * side**2
    return moved


def _rdnet_elements(architecture: RDNetArchitecture, image_size_px: int, channels: int) -> int:
    """Counts with each layer norm computed in the pass that reads its input, and GELU in the one that writes it."""
    side, width = image_size_px // architecture.patch_px, architecture.stem_width
    moved = IMAGE * channels * image_size_px**2 + STEM * width * side**2
    for stage, (layers, growth) in enumerate(zip(architecture.block_sizes, architecture.growth_rate, strict=True)):
        if stage:
            moved += JOINED * width * side**2
            width = round_width(width * architecture.compression)
            side //= 2 if stage in architecture.halved_stages else 1
            moved += NEW_PLAIN * width * side**2
        new = NEW_GATED if stage >= architecture.squeeze_excite_from else NEW_PLAIN
        for _ in range(layers):
            inner = width + round_width(width * architecture.bottleneck_width)
            moved += (CONCATENATION * width + INNER * inner + new * growth) * side**2
            width += growth
    return moved + JOINED * width * side**2
