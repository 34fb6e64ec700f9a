"""Dual Path Networks (1707.01629): a residual and a dense path through shared blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from densenet_jax.models.head import HeadOptions, classify
from densenet_jax.models.layers import (
    BatchNorm,
    Convolution,
    DType,
    Fan,
    NormOptions,
    global_average_pool,
    max_pool,
)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "silu": jax.nn.silu}
SAVED_BY_REMAT = "convolution"


class NormActivation(nn.Module):
    """Norm, then activation; parameters bn."""

    norm_options: NormOptions
    dtype: DType
    param_dtype: DType
    activation: str = "relu"
    after_convolution: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        """Normalised and activated values."""
        types = (self.dtype, self.param_dtype)
        norm = BatchNorm(x.shape[-1], self.norm_options, *types, self.after_convolution, name="bn")
        return ACTIVATIONS[self.activation](norm(x, train))


class NormActivationConvolution(nn.Module):
    """Norm, ReLU, convolution; parameters bn and conv."""

    features: int
    kernel_size: int
    stride: int
    groups: int
    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType
    after_convolution: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Features of the convolution."""
        types = (self.dtype, self.param_dtype)
        norm = BatchNorm(x.shape[-1], self.norm_options, *types, self.after_convolution, name="bn")
        y = jax.nn.relu(norm(x, train))
        shape = (x.shape[-1], self.features, self.kernel_size, self.stride, self.groups)
        return checkpoint_name(Convolution(*shape, self.init_fan, *types, name="conv")(y), SAVED_BY_REMAT)


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
    width: int
    residual_width: int
    dense_increment: int
    groups: int
    split_projection: bool
    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Both paths after the block, joined."""
        stride = 2 if self.kind == "down" else 1
        shortcut = x
        if self.kind != "normal":
            width = self.residual_width + 2 * self.dense_increment
            shortcut = self._convolution(f"c1x1_w_s{stride}", width, stride=stride)(x, train)
        residual, dense = split_paths(shortcut, self.residual_width)
        y = self._convolution("c1x1_a", self.width)(x, train)
        y = self._convolution("c3x3_b", self.width, 3, stride, self.groups, after_convolution=True)(y, train)
        new_residual, new_dense = self._project(y, train)
        return join_paths(residual + new_residual, dense, new_dense)

    @nn.nowrap
    def _project(self, y: Float[Array, "b h w c"], train: bool) -> tuple[Array, Array]:
        widths = (self.residual_width, self.dense_increment)
        if not self.split_projection:
            y = self._convolution("c1x1_c", sum(widths), after_convolution=True)(y, train)
            return split_paths(y, self.residual_width)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = NormActivation(self.norm_options, after_convolution=True, name="c1x1_c", **types)(y, train)
        residual, dense = (
            checkpoint_name(
                Convolution(y.shape[-1], width, init_fan=self.init_fan, name=f"c1x1_c{index}", **types)(y),
                SAVED_BY_REMAT,
            )
            for index, width in enumerate(widths, 1)
        )
        return residual, dense

    @nn.nowrap
    def _convolution(
        self,
        name: str,
        features: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        after_convolution: bool = False,
    ) -> NormActivationConvolution:
        return NormActivationConvolution(
            features,
            kernel_size,
            stride,
            groups,
            self.norm_options,
            self.init_fan,
            self.dtype,
            self.param_dtype,
            after_convolution,
            name=name,
        )


class Stem(nn.Module):
    """Convolution at stride 2, norm, activation; parameters conv and bn."""

    features: int
    kernel_size: int
    activation: str
    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        """Features at half the size."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = (x.shape[-1], self.features, self.kernel_size, 2)
        x = Convolution(*shape, init_fan=self.init_fan, name="conv", **types)(x)
        x = BatchNorm(self.features, self.norm_options, after_convolution=True, name="bn", **types)(x, train)
        return ACTIVATIONS[self.activation](x)


class DualPathNetwork(nn.Module):
    """A Dual Path Network; the attributes up to init_fan are those of variants.DualPathArchitecture.

    Parameters are named as in the published PyTorch checkpoints: conv1_1, conv{2-5}_{j}/..., conv5_bn_ac/bn,
    classifier.

    Attributes:
      norm_options: of all batch norms.
      head_options: of pooling and classifier.
      output: "logits" float32[b, k], "pooled" [b, c], "map" [b, h, w, c], or "pyramid", a dict from each stage's stride
        to its map (raw stage outputs; the last one normalised and activated).
      remat: recompute norms and concatenations in the backward pass instead of storing them.
      dtype: of activations; param_dtype: of parameters.
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

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Any:
        """Logits (or what output names) of normalised images float[b, h, w, channels]."""
        common = {
            "norm_options": self.norm_options,
            "init_fan": self.init_fan,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        kernel_size = 3 if self.small else 7
        stem = Stem(self.stem_width, kernel_size, self.activation, name="conv1_1", **common)
        x = max_pool(stem(images.astype(self.dtype), train), repeat_border=self.norm_options.folded)
        pyramid = {}
        for stage in range(len(self.block_sizes)):
            x = self._stage(x, stage, common, train)
            pyramid[4 * 2**stage] = x
        types = (self.dtype, self.param_dtype)
        x = NormActivation(self.norm_options, *types, self.activation, name="conv5_bn_ac")(x, train)
        if self.output == "pyramid":
            return {**pyramid, max(pyramid): x}
        if self.output == "map":
            return x
        if self.output == "pooled":
            return global_average_pool(x)
        return classify(x, self.head_options, train, self.make_rng)

    @nn.nowrap
    def _stage(self, x: Float[Array, "b h w c"], stage: int, common: dict[str, Any], train: bool) -> Array:
        block = DualPathBlock
        if self.remat:
            policy = jax.checkpoint_policies.save_only_these_names(SAVED_BY_REMAT)
            block = nn.remat(DualPathBlock, static_argnums=(2,), policy=policy)
        for index in range(self.block_sizes[stage]):
            kind = "normal" if index else ("down" if stage else "proj")
            x = block(
                kind=kind,
                width=self.reduction_width * 2**stage,
                residual_width=64 * 2**stage * (1 if self.small else 4),
                dense_increment=self.dense_increments[stage],
                groups=self.groups,
                split_projection=self.split_projection,
                name=f"conv{stage + 2}_{index + 1}",
                **common,
            )(x, train)
        return x
