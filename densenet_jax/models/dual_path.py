"""Dual Path Networks (1707.01629): a residual and a dense path through shared blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from densenet_jax.models.arithmetic import Arithmetic, arithmetic_of, rearranges_stem
from densenet_jax.models.dual_path_once import normalize_once_stage, path_norms_agree
from densenet_jax.models.dual_path_stage import BlockArrays, BlockMoments, NormReader, StageForm, StageOptions
from densenet_jax.models.head import HeadOptions, classify
from densenet_jax.models.layers import (
    BatchNorm,
    Convolution,
    DType,
    Fan,
    FeatureMap,
    NormOptions,
    global_average_pool,
    max_pool,
)
from densenet_jax.models.pooled_norms import norm_relu_max_pool

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "silu": jax.nn.silu}
SAVED_BY_REMAT = "convolution"


class NormActivation(nn.Module):
    """Norm, then activation; parameters bn."""

    in_features: int
    norm_options: NormOptions
    dtype: DType
    param_dtype: DType
    activation: str = "relu"
    after_convolution: bool = False

    def setup(self) -> None:
        """Declares the norm."""
        types = (self.dtype, self.param_dtype)
        self.bn = BatchNorm(self.in_features, self.norm_options, *types, self.after_convolution)

    def __call__(self, x: FeatureMap | Array, train: bool) -> Float[Array, "b h w c"]:
        """Normalized and activated values."""
        return ACTIVATIONS[self.activation](self.bn(x, train))


class NormActivationConvolution(nn.Module):
    """Norm, ReLU, convolution; parameters bn and conv."""

    in_features: int
    features: int
    kernel_size: int
    stride: int
    groups: int
    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType
    after_convolution: bool = False

    def setup(self) -> None:
        """Declares norm and convolution."""
        types = (self.dtype, self.param_dtype)
        self.bn = BatchNorm(self.in_features, self.norm_options, *types, self.after_convolution)
        shape = (self.in_features, self.features, self.kernel_size, self.stride, self.groups)
        self.conv = Convolution(*shape, self.init_fan, *types)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Features of the convolution."""
        return checkpoint_name(self.conv(jax.nn.relu(self.bn(x, train))), SAVED_BY_REMAT)

    def arrays(self, split: int = 0) -> NormReader:
        """The norm with its kernel, in two where the first `split` outputs go another way than the others."""
        kernel = self.conv.kernel
        return NormReader(self.bn.arrays(), (kernel[..., :split], kernel[..., split:]) if split else (kernel,))


def split_paths(x: Float[Array, "b h w c"], residual_width: int) -> tuple[Array, Array]:
    """The residual path's feature maps, which come first, and the dense path's."""
    return x[..., :residual_width], x[..., residual_width:]


def join_paths(residual: Array, dense: Array, new: Array) -> Float[Array, "b h w c"]:
    """One tensor of both paths: the residual sum, the dense path so far, and what this block adds to it."""
    return jnp.concatenate([residual, dense, new], axis=-1)


class DualPathBlock(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions whose output is added to one path and concatenated to the other.

    Parameters c1x1_w_s1 or c1x1_w_s2 (projection), c1x1_a, c3x3_b, c1x1_c; the b-form has c1x1_c/bn, c1x1_c1, c1x1_c2.

    Attributes:
      kind: "proj" (projects both paths), "down" (likewise, at stride 2) or "normal".
      width: of the 1x1 and the 3x3 convolution.
      residual_width: of the residual path.
      dense_increment: feature maps added to the dense path.
    """

    kind: str
    in_features: int
    width: int
    residual_width: int
    dense_increment: int
    groups: int
    split_projection: bool
    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType

    @property
    def stride(self) -> int:
        """Of the block."""
        return 2 if self.kind == "down" else 1

    def setup(self) -> None:
        """Declares the block's convolutions with their norms."""
        widths = (self.residual_width, self.dense_increment)
        if self.kind != "normal":
            shortcut_width = self.residual_width + 2 * self.dense_increment
            projection = self._convolution(self.in_features, shortcut_width, stride=self.stride)
            setattr(self, f"c1x1_w_s{self.stride}", projection)
        self.c1x1_a = self._convolution(self.in_features, self.width)
        self.c3x3_b = self._convolution(self.width, self.width, 3, self.stride, self.groups, after_convolution=True)
        self.c1x1_c: nn.Module
        if not self.split_projection:
            self.c1x1_c = self._convolution(self.width, sum(widths), after_convolution=True)
            return
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.c1x1_c = NormActivation(self.width, self.norm_options, after_convolution=True, **types)
        self.c1x1_c1, self.c1x1_c2 = (
            Convolution(self.width, width, init_fan=self.init_fan, **types) for width in widths
        )

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Both paths after the block, joined."""
        shortcut = x if self.kind == "normal" else self._projection()(x, train)
        residual, dense = split_paths(shortcut, self.residual_width)
        y = self.c3x3_b(self.c1x1_a(x, train), train)
        new_residual, new_dense = self._project(y, train)
        return join_paths(residual + new_residual, dense, new_dense)

    def arrays(self) -> BlockArrays:
        """All arrays of the block, its last kernels apart for each path."""
        third = self.c1x1_c.arrays(self.residual_width) if not self.split_projection else None
        if third is None:
            third = NormReader(self.c1x1_c.bn.arrays(), (self.c1x1_c1.kernel, self.c1x1_c2.kernel))
        projection = None if self.kind == "normal" else self._projection().arrays()
        return BlockArrays(self.c1x1_a.arrays(), self.c3x3_b.arrays(), third, projection)

    def record(self, moments: BlockMoments, positions_in: int, positions_out: int) -> None:
        """Takes a training step's moments into the running statistics.

        Args:
          moments: of the block's norms.
          positions_in: values a channel in the whole batch before the stride.
          positions_out: the same after it.
        """
        norms = [(self.c1x1_a, moments.first), (self.c3x3_b, moments.second)]
        norms += [] if self.kind == "normal" else [(self._projection(), moments.projection)]
        for module, seen in norms:
            if seen is not None:
                module.bn.record(seen, positions_in // seen.mean.shape[0])
        if moments.third is not None:
            self.c1x1_c.bn.record(moments.third, positions_out // moments.third.mean.shape[0])

    def _projection(self) -> NormActivationConvolution:
        found: NormActivationConvolution = getattr(self, f"c1x1_w_s{self.stride}")
        return found

    def _project(self, y: Float[Array, "b h w c"], train: bool) -> tuple[Array, Array]:
        y = self.c1x1_c(y, train)
        if not self.split_projection:
            return split_paths(y, self.residual_width)
        residual, dense = (
            checkpoint_name(convolution(y), SAVED_BY_REMAT) for convolution in (self.c1x1_c1, self.c1x1_c2)
        )
        return residual, dense

    @nn.nowrap
    def _convolution(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        after_convolution: bool = False,
    ) -> NormActivationConvolution:
        return NormActivationConvolution(
            in_features,
            features,
            kernel_size,
            stride,
            groups,
            self.norm_options,
            self.init_fan,
            self.dtype,
            self.param_dtype,
            after_convolution,
        )


class Stem(nn.Module):
    """Convolution at stride 2, norm, activation; parameters conv and bn.

    Called, it gives features at half the size; `pooled` those at a quarter, behind the maximum that follows.
    """

    in_features: int
    features: int
    kernel_size: int
    activation: str
    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType
    arithmetic: Arithmetic | None = None

    def setup(self) -> None:
        """Declares the convolution and the norm."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = (self.in_features, self.features, self.kernel_size, 2)
        rearranged = rearranges_stem(self.arithmetic)
        self.conv = Convolution(*shape, init_fan=self.init_fan, space_to_depth=rearranged, **types)
        self.bn = BatchNorm(self.features, self.norm_options, after_convolution=True, **types)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Features at half the size."""
        return ACTIVATIONS[self.activation](self.bn(self.conv(x), train))

    def pooled(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h4 w4 c2"]:
        """Their 3x3 maximum at stride 2; with arithmetic it is taken before norm and ReLU (which alone is monotone)."""
        if self.arithmetic is not None and self.activation == "relu":
            return norm_relu_max_pool(self.conv, self.bn, x, train, self.arithmetic)
        return max_pool(self(x, train), repeat_border=self.norm_options.folded)


class DualPathNetwork(nn.Module):
    """A Dual Path Network; the attributes up to init_fan are those of variants.DualPathArchitecture.

    Parameters are named as in the published PyTorch checkpoints: conv1_1, conv{2-5}_{j}/..., conv5_bn_ac/bn,
    classifier.

    Attributes:
      norm_options: of all batch norms.
      head_options: of pooling and classifier.
      output: "logits" float32[b, k], "pooled" [b, c], "map" [b, h, w, c], or "pyramid", a dict from each stage's stride
        to its map (raw stage outputs; the last one normalized and activated).
      remat: recompute norms and concatenations in the backward pass instead of storing them.
      dtype: of activations; param_dtype: of parameters.
      block_form: the arithmetic of a stage in training; None is each block for itself, the readable reference.
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
    norm_options: NormOptions = NormOptions(epsilon=1e-3)
    head_options: HeadOptions = HeadOptions(1000)
    output: str = "logits"
    remat: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    block_form: StageForm | None = normalize_once_stage

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Any:
        """Logits (or what output names) of normalized images float[b, h, w, channels]."""
        common = {
            "norm_options": self.norm_options,
            "init_fan": self.init_fan,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        kernel_size = 3 if self.small else 7
        images = images.astype(self.dtype)
        shape = (images.shape[-1], self.stem_width, kernel_size, self.activation)
        stem = Stem(*shape, arithmetic=arithmetic_of(self.block_form, None), name="conv1_1", **common)
        features = FeatureMap(stem.pooled(images, train))
        pyramid = {}
        for stage in range(len(self.block_sizes)):
            features = self._stage(features, stage, common, train)
            if self.output == "pyramid":
                pyramid[4 * 2**stage] = features.raw(self.norm_options.epsilon)
        types = (self.dtype, self.param_dtype)
        width = features.values.shape[-1]
        x = NormActivation(width, self.norm_options, *types, self.activation, name="conv5_bn_ac")(features, train)
        if self.output == "pyramid":
            return {**pyramid, max(pyramid): x}
        if self.output == "map":
            return x
        if self.output == "pooled":
            return global_average_pool(x)
        return classify(x, self.head_options, train, self.make_rng)

    @nn.nowrap
    def _stage(self, features: FeatureMap, stage: int, common: dict[str, Any], train: bool) -> FeatureMap:
        blocks = self._blocks(features.values.shape[-1], stage, common)
        if train and self.block_form is not None and not self.norm_options.folded:
            arrays = [block.arrays() for block in blocks]
            if path_norms_agree(arrays):
                return self._by_form(self.block_form, features, blocks, arrays)
        x = features.raw(self.norm_options.epsilon)
        for block in blocks:
            x = block(x, train)
        return FeatureMap(x)

    @nn.nowrap
    def _by_form(
        self, form: StageForm, features: FeatureMap, blocks: list[DualPathBlock], arrays: list[BlockArrays]
    ) -> FeatureMap:
        options = StageOptions(self.norm_options, self.dtype, self.groups, blocks[0].stride, self.remat)
        result = form(features, arrays, options)
        before, after = (math.prod(maps.shape[:3]) for maps in (features.values, result.features.values))
        for index, (block, moments) in enumerate(zip(blocks, result.moments, strict=True)):
            block.record(moments, after if index else before, after)
        return result.features

    @nn.nowrap
    def _blocks(self, in_features: int, stage: int, common: dict[str, Any]) -> list[DualPathBlock]:
        kind: type[DualPathBlock] = DualPathBlock
        if self.remat:
            policy = jax.checkpoint_policies.save_only_these_names(SAVED_BY_REMAT)
            kind = nn.remat(DualPathBlock, static_argnums=(2,), policy=policy)
        residual_width = 64 * 2**stage * (1 if self.small else 4)
        increment = self.dense_increments[stage]
        return [
            kind(
                kind="normal" if index else ("down" if stage else "proj"),
                in_features=residual_width + (index + 2) * increment if index else in_features,
                width=self.reduction_width * 2**stage,
                residual_width=residual_width,
                dense_increment=increment,
                groups=self.groups,
                split_projection=self.split_projection,
                name=f"conv{stage + 2}_{index + 1}",
                **common,
            )
            for index in range(self.block_sizes[stage])
        ]
