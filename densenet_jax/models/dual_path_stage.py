"""What a stage of dual-path blocks hands to the arithmetic that computes it in training, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from densenet_jax.models.layers import DType, FeatureMap, Moments, NormArrays, NormOptions


class NormReader(NamedTuple):
    """A norm and the kernels that read what it normalizes, each for another output."""

    norm: NormArrays
    kernels: tuple[Array, ...]


class BlockArrays(NamedTuple):
    """Parameters and running statistics of one block.

    Attributes:
      first: the 1x1 convolution of both paths.
      second: the grouped 3x3 convolution.
      third: the 1x1 convolutions onto the residual and onto the dense path.
      projection: the 1x1 convolution of the shortcut onto both paths, in a stage's first block only.
    """

    first: NormReader
    second: NormReader
    third: NormReader
    projection: NormReader | None = None


class BlockMoments(NamedTuple):
    """What each norm of a block saw in a training step; None where it is frozen or missing."""

    first: Moments | None
    second: Moments | None
    third: Moments | None
    projection: Moments | None


@dataclass(frozen=True)
class StageOptions:
    """What a form needs to know besides arrays.

    Attributes:
      norm: of all batch norms.
      dtype: of activations and convolutions.
      groups: of channels in the 3x3 convolutions.
      stride: of the first block.
      remat: keep x^ of the two paths only and recompute each block's convolutions.
    """

    norm: NormOptions = field(default_factory=NormOptions)
    dtype: DType = jnp.float32
    groups: int = 1
    stride: int = 1
    remat: bool = False


class StageResult(NamedTuple):
    """Both paths after the stage, residual sum first, and for each block the moments its statistics take in."""

    features: FeatureMap
    moments: tuple[BlockMoments, ...]


StageForm = Callable[[FeatureMap, Sequence[BlockArrays], StageOptions], StageResult]
