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
from densenet_jax.models.head import HeadOptions, Output, check_size, has_stride, select_output, tap
from densenet_jax.models.layers import (
    SAVED_BY_REMAT,
    BatchNorm,
    Convolution,
    FeatureMap,
    NormOptions,
    average_pool,
    blur_pool,
    dropout,
    fold_key,
    max_pool,
)
from densenet_jax.models.variants import DenseNetArchitecture, Fan

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
    init_fan: Fan = "fan_in"
    param_dtype: DType = jnp.float32

    @property
    def types(self) -> dict[str, DType]:
        """Types of activations and parameters."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


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
    options: BlockOptions

    def setup(self) -> None:
        """Declares the layer's norms and convolutions."""
        types = self.options.types
        kernels = {"init_fan": self.options.init_fan, **types}
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
        keep: bool = False,
    ) -> tuple[Float[Array, "b h1 w1 c2"] | None, Float[Array, "b h2 w2 c2"]]:
        """Convolution, norm and activation for each layer, then 3x3 max pooling at stride 2.

        Args:
            layers: convolutions with their norms; without a norm, a convolution is the whole stem (CIFAR).
            blur: pool at stride 1, then blur at stride 2.
            keep: also return the feature map before pooling, else None.
        """
        for convolution, norm in layers:
            x = convolution(x)
            if norm is None:
                return None, x
            x = activation(norm(x, train))
            repeat_border = norm.options.folded
        pooled = max_pool(x, stride=1 if blur else 2, repeat_border=repeat_border)
        return x if keep else None, blur_pool(pooled) if blur else pooled

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
    options: BlockOptions = BlockOptions()
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
                self.options,
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
    implementation: Plain = PLAIN

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool) -> Float[Array, "b h2 w2 features"]:
        """Returns features at half the size, rounded down."""
        width, options = x.values.shape[-1], self.options
        norm = BatchNorm(width, options.norm, name="norm", **options.types)
        convolution = Convolution(width, self.features, init_fan=options.init_fan, name="conv", **options.types)
        drops = train and options.dropout_rate and options.dropout_every_convolution
        key = self.make_rng("dropout") if drops else None
        return self.implementation.transition(norm, convolution, x, train, self.blur, options.dropout_rate, key)


class DenseNet(nn.Module):
    """A DenseNet.

    Parameters are named as in the published PyTorch checkpoints: conv0, norm0, denseblock{i}/denselayer{j}/...,
    transition{i}/..., norm5, classifier.

    Attributes:
        output: as for `create_model`; stride 2 is the stem before its pooling, the others are raw block outputs, the
            last one after norm and ReLU.
    """

    architecture: DenseNetArchitecture = DenseNetArchitecture()
    norm_options: NormOptions = NormOptions()
    head_options: HeadOptions = HeadOptions(1000)
    layer_dropout: float = 0.0
    dropout_every_convolution: bool = True
    output: Output = "logits"
    remat: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    implementation: Plain = PLAIN

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the feature maps that output may name."""
        blocks = range(len(self.architecture.block_sizes))
        if self.architecture.stem == "cifar":
            return tuple(2**block for block in blocks)
        return (2, *(4 * 2**block for block in blocks))

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Any:
        """Returns logits (or what output names) of normalized images.

        Raises:
            UserError: the images are smaller than the strides allow.
        """
        net, halvings = self.architecture, 2 ** (len(self.architecture.block_sizes) - 1)
        height, width = images.shape[1:3]
        check_size(height, width, halvings if net.stem == "cifar" else 4 * (halvings - 1) + 1)
        drops = (self.layer_dropout, self.dropout_every_convolution)
        options = BlockOptions(self.norm_options, self.dtype, *drops, self.remat, net.init_fan, self.param_dtype)
        layers = self._stem_layers(images.shape[-1], options.types)
        stem = (layers, images.astype(self.dtype), train, jax.nn.relu, net.blur != "none")
        unpooled, x = self.implementation.stem(*stem, has_stride(self.output, 2, by_default=False))
        pyramid = {} if unpooled is None else {2: unpooled}
        strides = self.strides[-len(net.block_sizes) :]
        for index, (num_layers, stride) in enumerate(zip(net.block_sizes, strides, strict=True), 1):
            block = (num_layers, net.growth_rate, net.bottleneck_width, options, self.implementation)
            features = DenseBlock(*block, name=f"denseblock{index}")(x, train)
            if index < len(net.block_sizes):
                features = features._replace(values=tap(self, stride, features.values))
                if has_stride(self.output, stride):
                    pyramid[stride] = features.raw(self.norm_options.epsilon)
                width = int(features.values.shape[-1] * net.compression)
                transition = (width, options, net.blur == "all", self.implementation)
                x = Transition(*transition, name=f"transition{index}")(features, train)
        norm = BatchNorm(features.values.shape[-1], self.norm_options, name="norm5", **options.types)
        x = tap(self, stride, jax.nn.relu(norm(features, train)))
        return select_output(self.output, x, {**pyramid, stride: x}, self.head_options, train, self.make_rng)

    @nn.nowrap
    def _stem_layers(self, channels: int, types: dict[str, DType]) -> list[tuple[Convolution, BatchNorm | None]]:
        net, k = self.architecture, self.architecture.growth_rate
        last = net.stem_width or 2 * k
        kernel_size, widths = {
            "plain": (7, (last,)),
            "deep": (3, (k, k, last)),
            "deep_tiered": (3, (3 * (k // 4), 6 * (k // 4), last)),
            "cifar": (3, (last,)),
        }[net.stem]
        layers: list[tuple[Convolution, BatchNorm | None]] = []
        for index, (before, width) in enumerate(zip((channels, *widths), widths, strict=False)):
            stride = 2 if index == 0 and net.stem != "cifar" else 1
            kernel = (kernel_size, stride, 1, net.init_fan)
            convolution = Convolution(before, width, *kernel, name=f"conv{index}", **types)
            norm = None
            if net.stem != "cifar":
                norm = BatchNorm(width, self.norm_options, after_convolution=True, name=f"norm{index}", **types)
            layers.append((convolution, norm))
        return layers
