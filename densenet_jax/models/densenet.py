"""DenseNet (1608.06993) in plain JAX, from top to bottom: dense layer, block, transition, stem, head.

The network owns the parameters; `Plain` computes its parts from them as the paper defines them.
`densenet_jax.models.fused` has a faster implementation of the same functions, which `create_model` picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType
from densenet_jax.models.head import HeadOptions, check_size, select_output, tap
from densenet_jax.models.layers import (
    SAVED_BY_REMAT,
    BatchNorm,
    Convolution,
    Fan,
    FeatureMap,
    NormOptions,
    average_pool,
    blur_pool,
    dropout,
    fold_key,
    max_pool,
)

STEMS = ("plain", "deep", "deep_tiered", "cifar")


@dataclass(frozen=True)
class BlockOptions:
    """Settings of a dense block and of the transition after it.

    Attributes:
        dropout_rate: after convolutions, in training only.
        dropout_every_convolution: as in the paper; otherwise after a layer's last convolution only.
        remat: keep only convolution outputs for the backward pass and recompute the rest (1707.06990).
    """

    norm: NormOptions = field(default_factory=NormOptions)
    dtype: DType = jnp.float32
    dropout_rate: float = 0.0
    dropout_every_convolution: bool = True
    remat: bool = False


def concatenate(features: Sequence[Array]) -> Float[Array, "b h w c"]:
    """Concatenates a layer's inputs: the block's input first, then the layers from oldest to newest."""
    return jnp.concatenate(features, axis=-1)


class DenseLayer(nn.Module):
    """Norm, ReLU and 3x3 convolution, after norm, ReLU and 1x1 convolution if there is a bottleneck (section 3).

    Parameters norm1, conv1 and, with a bottleneck, norm2, conv2.
    """

    in_features: int
    growth_rate: int
    bottleneck_width: int
    init_fan: Fan
    options: BlockOptions
    param_dtype: DType

    def setup(self) -> None:
        """Declares the layer's norms and convolutions."""
        types = {"dtype": self.options.dtype, "param_dtype": self.param_dtype}
        kernels = {"init_fan": self.init_fan, **types}
        self.norm1 = BatchNorm(self.in_features, self.options.norm, **types)
        if not self.bottleneck_width:
            self.conv1 = Convolution(self.in_features, self.growth_rate, 3, **kernels)
            return
        width = self.bottleneck_width * self.growth_rate
        self.conv1 = Convolution(self.in_features, width, 1, **kernels)
        self.norm2 = BatchNorm(width, self.options.norm, after_convolution=True, **types)
        self.conv2 = Convolution(width, self.growth_rate, 3, **kernels)

    def __call__(
        self, features: tuple[Array, ...], train: bool, key: Array | None = None
    ) -> Float[Array, "b h w growth_rate"]:
        """Returns growth_rate new feature maps, from the block's input and the earlier layers' outputs."""
        rate = self.options.dropout_rate
        x = self.conv1(jax.nn.relu(self.norm1(concatenate(features), train)))
        x = checkpoint_name(x, SAVED_BY_REMAT)
        if not self.bottleneck_width:
            return dropout(x, rate, key)
        if self.options.dropout_every_convolution:
            x = dropout(x, rate, fold_key(key, 0))
        x = self.conv2(jax.nn.relu(self.norm2(x, train)))
        x = checkpoint_name(x, SAVED_BY_REMAT)
        return dropout(x, rate, fold_key(key, 1))


@dataclass(frozen=True)
class Plain:
    """Computes stem, dense block and transition as the paper defines them."""

    def stem(
        self,
        layers: Sequence[tuple[Convolution, BatchNorm | None]],
        x: Float[Array, "b h w c"],
        train: bool,
        activation: Callable[[Array], Array],
        blur: bool = False,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Convolution, norm and activation for each layer, then 3x3 max pooling at stride 2.

        Args:
            layers: convolutions with their norms; without a norm, a convolution is the whole stem (CIFAR).
            blur: pool at stride 1, then blur at stride 2.
        """
        for convolution, norm in layers:
            x = convolution(x)
            if norm is None:
                return x
            x = activation(norm(x, train))
            repeat_border = norm.options.folded
        if blur:
            return blur_pool(max_pool(x, stride=1, repeat_border=repeat_border))
        return max_pool(x, repeat_border=repeat_border)

    def dense_block(
        self,
        layers: Sequence[DenseLayer],
        x: Float[Array, "b h w c"],
        train: bool,
        key: Array | None,
        options: BlockOptions,
    ) -> FeatureMap:
        """Concatenates the input and the output of every layer, each of which reads everything before it."""
        features: tuple[Array, ...] = (x,)
        for index, layer in enumerate(layers):
            features = (*features, layer(features, train, fold_key(key, index)))
        return FeatureMap(concatenate(features))

    def transition(
        self,
        norm: BatchNorm,
        convolution: Convolution,
        x: FeatureMap,
        train: bool,
        blur: bool = False,
        rate: float = 0.0,
        key: Array | None = None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Norm, ReLU, 1x1 convolution, dropout, then 2x2 average (or blur) pooling at stride 2."""
        y = dropout(convolution(jax.nn.relu(norm(x, train))), rate, key)
        return blur_pool(y) if blur else average_pool(y)


PLAIN = Plain()


class DenseBlock(nn.Module):
    """num_layers dense layers on feature maps of one size (1608.06993, section 3); parameters denselayer{1..n}."""

    num_layers: int
    growth_rate: int
    bottleneck_width: int = 4
    init_fan: Fan = "fan_in"
    options: BlockOptions = BlockOptions()
    param_dtype: DType = jnp.float32
    implementation: Plain = PLAIN

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> FeatureMap:
        """Returns float[b, h, w, c + num_layers * growth_rate]: the input and all layers' outputs."""
        make_layer: type[DenseLayer] = DenseLayer
        if self.options.remat:
            policy = jax.checkpoint_policies.save_only_these_names(SAVED_BY_REMAT)
            make_layer = nn.remat(DenseLayer, static_argnums=(2,), policy=policy)
        layers = [
            make_layer(
                x.shape[-1] + index * self.growth_rate,
                self.growth_rate,
                self.bottleneck_width,
                self.init_fan,
                self.options,
                self.param_dtype,
                name=f"denselayer{index + 1}",
            )
            for index in range(self.num_layers)
        ]
        key = self.make_rng("dropout") if train and self.options.dropout_rate else None
        return self.implementation.dense_block(layers, x, train, key, self.options)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution to fewer feature maps, then pooling to half the size; parameters norm and conv."""

    features: int
    options: BlockOptions
    blur: bool
    init_fan: Fan
    param_dtype: DType
    implementation: Plain = PLAIN

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool) -> Float[Array, "b h2 w2 features"]:
        """Returns features at half the size, rounded down."""
        width, options = x.values.shape[-1], self.options
        types = {"dtype": options.dtype, "param_dtype": self.param_dtype}
        norm = BatchNorm(width, options.norm, name="norm", **types)
        convolution = Convolution(width, self.features, init_fan=self.init_fan, name="conv", **types)
        drops = train and options.dropout_rate and options.dropout_every_convolution
        key = self.make_rng("dropout") if drops else None
        return self.implementation.transition(norm, convolution, x, train, self.blur, options.dropout_rate, key)


class DenseNet(nn.Module):
    """A DenseNet; the attributes up to init_fan are those of variants.DenseNetArchitecture.

    Parameters are named as in the published PyTorch checkpoints: conv0, norm0, denseblock{i}/denselayer{j}/...,
    transition{i}/..., norm5, classifier.

    Attributes:
        output: as for `create_model`; a pyramid has raw block outputs, the last one after norm and ReLU.
    """

    growth_rate: int = 32
    block_sizes: tuple[int, ...] = (6, 12, 24, 16)
    stem: str = "plain"
    stem_width: int | None = None
    bottleneck_width: int = 4
    compression: float = 0.5
    blur: str = "none"
    init_fan: Fan = "fan_in"
    norm_options: NormOptions = NormOptions()
    head_options: HeadOptions = HeadOptions(1000)
    layer_dropout: float = 0.0
    dropout_every_convolution: bool = True
    output: str = "logits"
    remat: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    implementation: Plain = PLAIN

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Any:
        """Returns logits (or what output names) of normalized images.

        Raises:
            UserError: the images are smaller than the strides allow.
        """
        self._check_size(*images.shape[1:3])
        options = BlockOptions(
            self.norm_options, self.dtype, self.layer_dropout, self.dropout_every_convolution, self.remat
        )
        shared = {"param_dtype": self.param_dtype, "implementation": self.implementation}
        layers = self._stem_layers(images.shape[-1])
        x = self.implementation.stem(layers, images.astype(self.dtype), train, jax.nn.relu, self.blur != "none")
        stride = 1 if self.stem == "cifar" else 4
        pyramid = {}
        for index, num_layers in enumerate(self.block_sizes, 1):
            shape = (num_layers, self.growth_rate, self.bottleneck_width, self.init_fan)
            features = DenseBlock(*shape, options, name=f"denseblock{index}", **shared)(x, train)
            if index < len(self.block_sizes):
                features = features._replace(values=tap(self, stride, features.values))
                if self.output == "pyramid":
                    pyramid[stride] = features.raw(self.norm_options.epsilon)
                width = int(features.values.shape[-1] * self.compression)
                blur = self.blur == "all"
                transition = Transition(width, options, blur, self.init_fan, name=f"transition{index}", **shared)
                x = transition(features, train)
                stride *= 2
        types = (self.dtype, self.param_dtype)
        norm = BatchNorm(features.values.shape[-1], self.norm_options, *types, name="norm5")
        x = tap(self, stride, jax.nn.relu(norm(features, train)))
        return select_output(self.output, x, {**pyramid, stride: x}, self.head_options, train, self.make_rng)

    @nn.nowrap
    def _stem_layers(self, channels: int) -> list[tuple[Convolution, BatchNorm | None]]:
        k = self.growth_rate
        last = self.stem_width or 2 * k
        kernel_size, widths = {
            "plain": (7, (last,)),
            "deep": (3, (k, k, last)),
            "deep_tiered": (3, (3 * (k // 4), 6 * (k // 4), last)),
            "cifar": (3, (last,)),
        }[self.stem]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layers: list[tuple[Convolution, BatchNorm | None]] = []
        for index, (before, width) in enumerate(zip((channels, *widths), widths, strict=False)):
            stride = 2 if index == 0 and self.stem != "cifar" else 1
            kernel = (kernel_size, stride, 1, self.init_fan)
            convolution = Convolution(before, width, *kernel, name=f"conv{index}", **types)
            norm = None
            if self.stem != "cifar":
                norm = BatchNorm(width, self.norm_options, after_convolution=True, name=f"norm{index}", **types)
            layers.append((convolution, norm))
        return layers

    @nn.nowrap
    def _check_size(self, height: int, width: int) -> None:
        halvings = 2 ** (len(self.block_sizes) - 1)
        smallest = halvings if self.stem == "cifar" else 4 * (halvings - 1) + 1
        check_size(height, width, smallest)
