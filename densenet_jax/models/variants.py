"""The table of variants: one row describes one network."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, field
from typing import Literal

from densenet_jax.errors import UserError
from densenet_jax.models.published import PUBLISHED, Preprocessing, PublishedResult, published_preprocessing

IMAGENET = Preprocessing()
TINY = Preprocessing(
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), input_px=32, test_px=32, crop_fraction=1.0
)
Fan = Literal["fan_in", "fan_out"]


@dataclass(frozen=True)
class DenseNetArchitecture:
    """Architecture of a DenseNet (1608.06993, sections 3 and 4).

    Attributes:
        growth_rate: new feature maps a dense layer adds (k).
        block_sizes: dense layers in each block.
        stem: "plain" 7x7 stride 2, "deep" or "deep_tiered" three 3x3, "cifar" one 3x3 without norm or pooling.
        stem_width: feature maps that enter the first block; None is twice the growth rate.
        bottleneck_width: the 1x1 convolution gives this many times the growth rate; 0 leaves it out.
        compression: the share of feature maps a transition keeps, in (0, 1].
        blur: where blur pooling replaces strided pooling: "none", "stem" or "all" (transitions too).
        init_fan: "fan_in" (torchvision) or "fan_out" (the paper's Torch code) of the He normal initializer.
    """

    growth_rate: int = 32
    block_sizes: tuple[int, ...] = (6, 12, 24, 16)
    stem: str = "plain"
    stem_width: int | None = None
    bottleneck_width: int = 4
    compression: float = 0.5
    blur: str = "none"
    init_fan: Fan = "fan_in"
    epsilon: float = 1e-5


@dataclass(frozen=True)
class DualPathArchitecture:
    """Architecture of a Dual Path Network (1707.01629, table 1).

    Attributes:
        block_sizes: blocks in each of the four stages.
        dense_increments: feature maps that a block of each stage adds to the dense path.
        reduction_width: width of the grouped 3x3 convolution of the first stage (k_r); doubles each stage.
        small: a 3x3 stem and a residual path of 64 to 512 instead of 7x7 and 256 to 2048.
        split_projection: the b-form: the last norm is shared by two 1x1 convolutions, one a path.
        activation: of the stem and of the head's norm, "relu" or "silu"; everything between is ReLU.
        init_fan: as for DenseNetArchitecture.
    """

    block_sizes: tuple[int, ...] = (3, 4, 20, 3)
    dense_increments: tuple[int, ...] = (16, 32, 24, 128)
    reduction_width: int = 96
    groups: int = 32
    stem_width: int = 64
    small: bool = False
    split_projection: bool = False
    activation: str = "relu"
    init_fan: Fan = "fan_in"
    epsilon: float = 1e-3


@dataclass(frozen=True)
class RDNetArchitecture:
    """Architecture of an RDNet (2403.19588, section 3 and table 1).

    Attributes:
        block_sizes: dense layers in each stage.
        growth_rate: new feature maps a dense layer of each stage adds.
        halved_stages: stages, counted from 0, at whose start height and width are halved.
        squeeze_excite_from: the first stage, counted from 0, whose layers end in squeeze and excite.
        stem_width: feature maps that enter the first stage.
        patch_px: side of the patches that the stem makes into one position each.
        bottleneck_width: a layer's first 1x1 convolution gives this many times the layer's input.
        compression: the share of feature maps that enters the next stage, in (0, 1].
        layer_scale: initial factor of a layer's output; 0 leaves the factor out.
    """

    block_sizes: tuple[int, ...] = (3,) * 7
    growth_rate: tuple[int, ...] = (64, 104, 128, 128, 128, 128, 224)
    halved_stages: tuple[int, ...] = (1, 2, 6)
    squeeze_excite_from: int = 2
    stem_width: int = 64
    patch_px: int = 4
    bottleneck_width: float = 4.0
    compression: float = 0.5
    layer_scale: float = 1e-6
    epsilon: float = 1e-6


Architecture = DenseNetArchitecture | DualPathArchitecture | RDNetArchitecture


@dataclass(frozen=True)
class Variant:
    """One row: a network, its preprocessing and published results; parameter_count is for num_classes and channels."""

    name: str
    architecture: Architecture
    parameter_count: int
    preprocessing: Preprocessing = IMAGENET
    num_classes: int = 1000
    channels: int = 3
    published: tuple[PublishedResult, ...] = field(default=())

    def results_of(self, source: str) -> tuple[PublishedResult, ...]:
        """Returns the published results of one checkpoint; empty if there are none."""
        return tuple(result for result in self.published if result.hub_id and result.hub_id == source)

    def preprocessing_of(self, source: str | None) -> Preprocessing:
        """Returns how the inputs of one checkpoint are prepared; the variant's own way if it is unknown."""
        return published_preprocessing(source) or self.preprocessing


def _densenet(name: str, count: int, **fields) -> Variant:
    return Variant(name, DenseNetArchitecture(**fields), count, published=PUBLISHED.get(name, ()))


def _tiny(name: str, count: int, growth_rate: int, layers: int, bottleneck: bool) -> Variant:
    fields = DenseNetArchitecture(
        growth_rate=growth_rate,
        block_sizes=(layers,) * 3,
        stem="cifar",
        stem_width=2 * growth_rate if bottleneck else 16,
        bottleneck_width=4 if bottleneck else 0,
        compression=0.5 if bottleneck else 1.0,
        init_fan="fan_out",
    )
    return Variant(name, fields, count, TINY, num_classes=10, published=PUBLISHED.get(name, ()))


def _like_published(name: str, architecture: Architecture, count: int) -> Variant:
    published = PUBLISHED.get(name, ())
    preprocessing = next((r.preprocessing for r in published if r.hub_id), IMAGENET)
    return Variant(name, architecture, count, preprocessing, published=published)


def _dual_path(name: str, count: int, *stages, **fields) -> Variant:
    return _like_published(name, DualPathArchitecture(*stages, **fields), count)


def _rdnet(name: str, count: int, stem_width: int, growth_rate: tuple[int, ...], halved: tuple[int, ...]) -> Variant:
    sizes = (3,) * len(growth_rate)
    return _like_published(name, RDNetArchitecture(sizes, growth_rate, halved, stem_width=stem_width), count)


_SMALL = {"small": True, "stem_width": 10, "reduction_width": 128, "dense_increments": (16, 32, 32, 64)}

_ROWS = (
    _densenet("densenet121", 7_978_856),
    _densenet("densenet161", 28_681_000, growth_rate=48, block_sizes=(6, 12, 36, 24)),
    _densenet("densenet169", 14_149_480, block_sizes=(6, 12, 32, 32)),
    _densenet("densenet201", 20_013_928, block_sizes=(6, 12, 48, 32)),
    _densenet("densenet264", 33_337_704, block_sizes=(6, 12, 64, 48)),
    _densenet("densenet264_k48", 72_686_632, growth_rate=48, block_sizes=(6, 12, 64, 48)),
    _densenet("densenet264d", 72_736_216, growth_rate=48, block_sizes=(6, 12, 64, 48), stem="deep"),
    _densenet("densenet121d", 7_998_088, stem="deep"),
    _densenet("densenetblur121d", 7_998_088, stem="deep", blur="stem"),
    _densenet("densenet232", 71_538_184, growth_rate=48, block_sizes=(6, 32, 48, 48)),
    _tiny("densenet_40_12", 1_019_722, growth_rate=12, layers=12, bottleneck=False),
    _tiny("densenet_100_12", 6_979_642, growth_rate=12, layers=32, bottleneck=False),
    _tiny("densenet_100_24", 27_249_082, growth_rate=24, layers=32, bottleneck=False),
    _tiny("densenet_bc_22_12", 71_686, growth_rate=12, layers=3, bottleneck=True),
    _tiny("densenet_bc_40_12", 176_122, growth_rate=12, layers=6, bottleneck=True),
    _tiny("densenet_bc_100_12", 769_162, growth_rate=12, layers=16, bottleneck=True),
    _tiny("densenet_bc_250_24", 15_324_406, growth_rate=24, layers=41, bottleneck=True),
    _tiny("densenet_bc_190_40", 25_624_430, growth_rate=40, layers=31, bottleneck=True),
    _dual_path("dpn48b", 9_126_226, **_SMALL, block_sizes=(3, 4, 6, 3), split_projection=True, activation="silu"),
    _dual_path("dpn68", 12_611_602, **_SMALL, block_sizes=(3, 4, 12, 3)),
    _dual_path("dpn68b", 12_611_602, **_SMALL, block_sizes=(3, 4, 12, 3), split_projection=True),
    _dual_path("dpn92", 37_668_392),
    # Blocks and dense increments of the stages, width of the first 3x3 convolution, its groups, width of the stem.
    _dual_path("dpn98", 61_570_728, (3, 6, 20, 3), (16, 32, 32, 128), 160, 40, 96),
    _dual_path("dpn107", 86_917_800, (4, 8, 20, 3), (20, 64, 64, 128), 200, 50, 128),
    _dual_path("dpn131", 79_254_504, (4, 8, 28, 3), (16, 32, 32, 128), 160, 40, 128),
    _rdnet("rdnet_tiny", 23_863_008, 64, (64, 104, *[128] * 4, 224), (1, 2, 6)),
    _rdnet("rdnet_small", 50_436_448, 72, (64, *[128] * 8, 240, 240), (1, 2, 9)),
    _rdnet("rdnet_base", 87_451_096, 120, (96, 128, *[168] * 7, 336, 336), (1, 2, 9)),
    _rdnet("rdnet_large", 186_269_632, 144, (128, 192, *[256] * 8, 360, 360), (1, 2, 10)),
)

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}


def get_variant(name: str) -> Variant:
    """Returns the row of one name.

    Raises:
        UserError: the name is not in the table; the message gives the nearest names.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    nearest = difflib.get_close_matches(str(name), VARIANTS, n=3, cutoff=0.5) or list(VARIANTS)[:3]
    raise UserError(
        f"unknown model {name!r}: the nearest names are {', '.join(nearest)}; "
        "densenet_jax.list_models() lists all of them"
    )


def list_models(pattern: str = "*") -> list[str]:
    """Lists names that match a shell-style pattern, in the table's order."""
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]
