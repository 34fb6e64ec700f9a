"""The arrays that a stage of dual-path blocks reads, returns and keeps for its derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from densenet_jax.models.fused.backend import Backend, Buffer
from densenet_jax.models.fused.norm import Normalization
from densenet_jax.models.fused.norm_relu_conv import NormReluConv, Window
from densenet_jax.models.fused.split import SplitConv
from densenet_jax.models.layers import BatchStats, NormOptions


class Block(NamedTuple):
    """The differentiated arrays of one block.

    Attributes:
        first: the 1x1 convolution of both paths.
        second: the grouped 3x3 convolution.
        third: the 1x1 convolution onto the residual and the dense path, of one kernel for both or one for each.
        projection: the 1x1 convolution of the shortcut onto both paths, in a stage's first block only.
    """

    first: SplitConv
    second: NormReluConv
    third: SplitConv
    projection: NormReluConv | None


class PerMap(NamedTuple):
    """One value for each feature map that a block makes: its running mean (None: frozen norms) or its statistics.

    second and third are for those convolutions' inputs, residual for the sum after the block, dense for the block's
    addition to the dense path (in the first block, with the shortcut's channels).
    """

    second: tuple[Any, ...]
    third: tuple[Any, ...]
    residual: tuple[Any, ...]
    dense: tuple[Any, ...]


class Config(NamedTuple):
    """Static configuration; stride is the first block's, remat keeps the paths only."""

    norm: NormOptions
    residual_width: int
    groups: int
    stride: int
    remat: bool
    backend: Backend

    def window(self, index: int) -> Window:
        """Returns stride and groups of a block's second convolution."""
        return Window(1 if index else self.stride, self.groups)

    def third(self, block: Block) -> SplitConv:
        """Returns a block's third convolution with a kernel for each path."""
        conv, width = block.third, self.residual_width
        if len(conv.kernels) == 2:
            return conv
        return conv._replace(kernels=(conv.kernels[0][..., :width], conv.kernels[0][..., width:]))

    def dense_ends(self, blocks: Sequence[Block]) -> list[int]:
        """Returns the dense path's width after each block."""
        new = [sum(kernel.shape[-1] for kernel in block.third.kernels) - self.residual_width for block in blocks]
        if blocks[0].projection is not None:
            new[0] += blocks[0].projection.kernel.shape[-1] - self.residual_width
        return [int(end) for end in np.cumsum(new)]

    def normalization(
        self, stats: BatchStats, shift: Array | None, grad_stats: BatchStats | None = None
    ) -> Normalization:
        """Returns the normalization that made x_hat of a feature map."""
        return Normalization(stats, None if shift is None else self.norm.epsilon, grad_stats)


class Outputs(NamedTuple):
    """x_hat of both paths, float[b, h, w, c], with its statistics; and all statistics, which have no derivative."""

    values: Array
    stats: BatchStats
    all_stats: PerMap


class Residuals(NamedTuple):
    """Values kept for the backward pass.

    Attributes:
        residual: the sum after each block.
        dense: x_hat of the dense path.
        bottlenecks: the outputs of each block's first two convolutions.
    """

    inputs: Array
    residual: tuple[Array, ...]
    dense: Buffer
    bottlenecks: tuple[tuple[Array, Array], ...] | None
    stats: PerMap
    blocks: tuple[Block, ...]
    shifts: PerMap

    def second_norm(self, config: Config, index: int) -> Normalization:
        """Returns the norm before a block's second convolution."""
        return config.normalization(self.stats.second[index], self.shifts.second[index])

    def third_norm(self, config: Config, index: int) -> Normalization:
        """Returns the norm before a block's third convolution."""
        return config.normalization(self.stats.third[index], self.shifts.third[index])

    def residual_norm(self, config: Config, index: int, grad_stats: BatchStats | None = None) -> Normalization:
        """Returns the norm of the sum after a block."""
        return config.normalization(self.stats.residual[index], self.shifts.residual[index], grad_stats)
