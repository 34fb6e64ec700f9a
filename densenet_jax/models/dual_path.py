"""Dual Path Networks (1707.01629) in plain JAX: a residual and a dense path through shared blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType
from densenet_jax.models import densenet
from densenet_jax.models.head import HeadOptions, Output, has_stride, select_output, tap
from densenet_jax.models.layers import (
    SAVED_BY_REMAT,
    BatchNorm,
    Convolution,
    FeatureMap,
    NormOptions,
)
from densenet_jax.models.variants import DualPathArchitecture, Fan

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "silu": jax.nn.silu}


class Part(nn.Module, kw_only=True):
    """A module with the settings that all parts of a Dual Path Network share."""

    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType

    @property
    def shared(self) -> dict[str, Any]:
        """Settings for a part of this part."""
        return {**self.types, "norm_options": self.norm_options, "init_fan": self.init_fan}

    @property
    def types(self) -> dict[str, DType]:
        """Types of activations and parameters."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class NormActivation(Part):
    """Norm, then activation; parameters bn."""

    in_features: int
    activation: str = "relu"
    after_convolution: bool = False

    def setup(self) -> None:
        """Declares the norm."""
        self.bn = BatchNorm(self.in_features, self.norm_options, after_convolution=self.after_convolution, **self.types)

    def __call__(self, x: FeatureMap | Array, train: bool) -> Float[Array, "b h w c"]:
        """Normalizes and activates."""
        return ACTIVATIONS[self.activation](self.bn(x, train))


class NormActivationConvolution(Part):
    """Norm, ReLU, convolution; parameters bn and conv."""

    in_features: int
    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    after_convolution: bool = False

    def setup(self) -> None:
        """Declares norm and convolution."""
        self.bn = BatchNorm(self.in_features, self.norm_options, after_convolution=self.after_convolution, **self.types)
        shape = (self.in_features, self.features, self.kernel_size, self.stride, self.groups)
        self.conv = Convolution(*shape, self.init_fan, **self.types)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Computes the convolution of relu(norm(x))."""
        return checkpoint_name(self.conv(jax.nn.relu(self.bn(x, train))), SAVED_BY_REMAT)


def split_paths(x: Float[Array, "b h w c"], residual_width: int) -> tuple[Array, Array]:
    """Splits features into the residual path, which comes first, and the dense path."""
    return x[..., :residual_width], x[..., residual_width:]


def join_paths(residual: Array, dense: Array, new: Array) -> Float[Array, "b h w c"]:
    """Concatenates the residual sum, the dense path so far, and what this block adds to it."""
    return jnp.concatenate([residual, dense, new], axis=-1)


class DualPathBlock(Part):
    """1x1, grouped 3x3 and 1x1 convolutions whose output is added to one path and concatenated to the other.

    Parameters c1x1_w_s1 or c1x1_w_s2 (projection), c1x1_a, c3x3_b, c1x1_c; the b-form has c1x1_c/bn, c1x1_c1, c1x1_c2.

    Attributes:
        kind: "proj" (projects both paths), "down" (likewise, at stride 2) or "normal".
        width: of the 1x1 and the 3x3 convolution.
        split_projection: the b-form.
    """

    kind: str
    in_features: int
    width: int
    residual_width: int
    dense_increment: int
    groups: int
    split_projection: bool

    @property
    def stride(self) -> int:
        """Stride of the 3x3 convolution and of the projection."""
        return 2 if self.kind == "down" else 1

    def setup(self) -> None:
        """Declares the block's convolutions with their norms."""
        widths = (self.residual_width, self.dense_increment)
        if self.kind != "normal":
            shortcut_width = self.residual_width + 2 * self.dense_increment
            shape = (self.in_features, shortcut_width, 1, self.stride)
            setattr(self, f"c1x1_w_s{self.stride}", NormActivationConvolution(*shape, **self.shared))
        self.c1x1_a = NormActivationConvolution(self.in_features, self.width, **self.shared)
        inner = {"after_convolution": True, **self.shared}
        self.c3x3_b = NormActivationConvolution(self.width, self.width, 3, self.stride, self.groups, **inner)
        self.c1x1_c: nn.Module
        if not self.split_projection:
            self.c1x1_c = NormActivationConvolution(self.width, sum(widths), **inner)
            return
        self.c1x1_c = NormActivation(self.width, **inner)
        self.c1x1_c1, self.c1x1_c2 = (
            Convolution(self.width, width, init_fan=self.init_fan, **self.types) for width in widths
        )

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Returns both paths after the block, the residual path first."""
        projection = self.projection()
        shortcut = x if projection is None else projection(x, train)
        residual, dense = split_paths(shortcut, self.residual_width)
        y = self.c3x3_b(self.c1x1_a(x, train), train)
        new_residual, new_dense = self._project(y, train)
        return join_paths(residual + new_residual, dense, new_dense)

    def projection(self) -> NormActivationConvolution | None:
        """Returns the projection of the shortcut, which only a stage's first block has."""
        return None if self.kind == "normal" else getattr(self, f"c1x1_w_s{self.stride}")

    def _project(self, y: Float[Array, "b h w c"], train: bool) -> tuple[Array, Array]:
        y = self.c1x1_c(y, train)
        if not self.split_projection:
            return split_paths(y, self.residual_width)
        residual, dense = (
            checkpoint_name(convolution(y), SAVED_BY_REMAT) for convolution in (self.c1x1_c1, self.c1x1_c2)
        )
        return residual, dense


class Stem(Part):
    """The parameters of a 3x3 or 7x7 convolution at stride 2 and its norm: conv and bn."""

    in_features: int
    features: int
    kernel_size: int

    def setup(self) -> None:
        """Declares the convolution and the norm."""
        shape = (self.in_features, self.features, self.kernel_size, 2)
        self.conv = Convolution(*shape, init_fan=self.init_fan, **self.types)
        self.bn = BatchNorm(self.features, self.norm_options, after_convolution=True, **self.types)


@dataclass(frozen=True)
class Plain(densenet.Plain):
    """Computes stem and stages as the paper defines them."""

    def stage(self, blocks: Sequence[DualPathBlock], x: FeatureMap, train: bool, remat: bool) -> FeatureMap:
        """Applies blocks one after the other; x is both paths of the stage before, or the stem's output."""
        values = x.raw(blocks[0].norm_options.epsilon)
        for block in blocks:
            values = block(values, train)
        return FeatureMap(values)


PLAIN = Plain()


class DualPathNetwork(nn.Module):
    """A Dual Path Network.

    Parameters are named as in the published PyTorch checkpoints: conv1_1, conv{2-5}_{j}/..., conv5_bn_ac/bn,
    classifier.

    Attributes:
        output: as for `create_model`; stride 2 is the stem before its pooling, the others are raw stage outputs, the
            last one normalized and activated.
    """

    architecture: DualPathArchitecture = DualPathArchitecture()
    norm_options: NormOptions = NormOptions(epsilon=1e-3)
    head_options: HeadOptions = HeadOptions(1000)
    output: Output = "logits"
    remat: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    implementation: Plain = PLAIN

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the feature maps that output may name: of the stem and of each stage."""
        return tuple(2 ** (stage + 1) for stage in range(1 + len(self.architecture.block_sizes)))

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Any:
        """Returns logits (or what output names) of normalized images."""
        net, last = self.architecture, len(self.architecture.block_sizes) - 1
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {"norm_options": self.norm_options, "init_fan": net.init_fan, **types}
        stem = Stem(images.shape[-1], net.stem_width, 3 if net.small else 7, name="conv1_1", **common)
        activation = ACTIVATIONS[net.activation]
        keep, images = has_stride(self.output, 2, by_default=False), images.astype(self.dtype)
        unpooled, x = self.implementation.stem([(stem.conv, stem.bn)], images, train, activation, keep=keep)
        features, pyramid = FeatureMap(x), {} if unpooled is None else {2: unpooled}
        for stage, stride in enumerate(self.strides[1:]):
            blocks = self._blocks(features.values.shape[-1], stage, common)
            features = self.implementation.stage(blocks, features, train, self.remat)
            if stage < last:
                features = features._replace(values=tap(self, stride, features.values))
            if has_stride(self.output, stride):
                pyramid[stride] = features.raw(self.norm_options.epsilon)
        width = features.values.shape[-1]
        x = NormActivation(width, net.activation, name="conv5_bn_ac", **common)(features, train)
        x = pyramid[stride] = tap(self, stride, x)
        return select_output(self.output, x, pyramid, self.head_options, train, self.make_rng)

    @nn.nowrap
    def _blocks(self, in_features: int, stage: int, common: dict[str, Any]) -> list[DualPathBlock]:
        make_block: type[DualPathBlock] = DualPathBlock
        if self.remat:
            policy = jax.checkpoint_policies.save_only_these_names(SAVED_BY_REMAT)
            make_block = nn.remat(DualPathBlock, static_argnums=(2,), policy=policy)
        net = self.architecture
        residual_width = 64 * 2**stage * (1 if net.small else 4)
        increment = net.dense_increments[stage]
        return [
            make_block(
                kind="normal" if index else ("down" if stage else "proj"),
                in_features=residual_width + (index + 2) * increment if index else in_features,
                width=net.reduction_width * 2**stage,
                residual_width=residual_width,
                dense_increment=increment,
                groups=net.groups,
                split_projection=net.split_projection,
                name=f"conv{stage + 2}_{index + 1}",
                **common,
            )
            for index in range(net.block_sizes[stage])
        ]
