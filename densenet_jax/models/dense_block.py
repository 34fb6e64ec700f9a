"""A dense block: one module that owns the parameters of all its layers, and the arithmetic it hands them to.

The arithmetic is a pure function of arrays (a form), so that several forms can stand behind one parameter tree. The
plain form below is the paper's definition written down: concatenate, normalize, ReLU, convolve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from densenet_jax.models.layers import (
    BatchNorm,
    Convolution,
    DType,
    Fan,
    FeatureMap,
    Moments,
    NormArrays,
    NormOptions,
    apply_norm,
    convolve,
    dropout,
    folded_norm,
)

SAVED_BY_REMAT = "convolution"


class LayerArrays(NamedTuple):
    """Parameters and running statistics of one dense layer; norm2 and kernel2 are None without a bottleneck."""

    norm1: NormArrays
    kernel1: Array
    norm2: NormArrays | None = None
    kernel2: Array | None = None


class LayerMoments(NamedTuple):
    """What one layer's norms saw in a training step; None in evaluation or where the norm is missing."""

    norm1: Moments | None
    norm2: Moments | None


@dataclass(frozen=True)
class BlockOptions:
    """What a form needs to know besides arrays.

    Attributes:
      norm: of all the block's batch norms.
      dtype: of activations and convolutions.
      dropout_rate: after convolutions, in training only.
      dropout_every_convolution: as in the paper; otherwise after a layer's last convolution only.
      remat: keep only convolution outputs for the backward pass and recompute the rest (1707.06990).
    """

    norm: NormOptions = field(default_factory=NormOptions)
    dtype: DType = jnp.float32
    dropout_rate: float = 0.0
    dropout_every_convolution: bool = True
    remat: bool = False


class BlockResult(NamedTuple):
    """The block's output and, for each layer, the moments that its running statistics take in."""

    features: FeatureMap
    moments: tuple[LayerMoments, ...]


Form = Callable[[Array, Sequence[LayerArrays], Array | None, BlockOptions, bool], BlockResult]


def layer_key(key: Array | None, index: int) -> Array | None:
    """The dropout key of one part: the same masks in every form."""
    return None if key is None else jax.random.fold_in(key, index)


def join(features: Sequence[Array]) -> Float[Array, "b h w c"]:
    """The concatenation that a layer reads: the block's input first, then the layers from oldest to newest."""
    return jnp.concatenate(features, axis=-1)


def dense_layer(
    features: tuple[Array, ...], layer: LayerArrays, key: Array | None, options: BlockOptions, train: bool
) -> tuple[Float[Array, "b h w k"], LayerMoments]:
    """One composite layer: norm, ReLU, convolution, once or (with a bottleneck) twice.

    Args:
      features: the block's input and the earlier layers' outputs, each float[b, h, w, *].
      layer: its arrays.
      key: for dropout; None switches it off.
      options: of the block.
      train: batch statistics instead of running ones.

    Returns:
      The layer's k new feature maps and the moments its norms saw.
    """
    x, moments1 = apply_norm(join(features), layer.norm1, options.norm, train, options.dtype)
    x = convolve(jax.nn.relu(x), layer.kernel1, padding=layer.kernel1.shape[0] // 2)
    x = checkpoint_name(x, SAVED_BY_REMAT)
    if layer.norm2 is None or layer.kernel2 is None:
        return dropout(x, options.dropout_rate, key), LayerMoments(moments1, None)
    if options.dropout_every_convolution:
        x = dropout(x, options.dropout_rate, layer_key(key, 0))
    x, moments2 = apply_norm(x, layer.norm2, options.norm, train, options.dtype)
    x = convolve(jax.nn.relu(x), layer.kernel2, padding=layer.kernel2.shape[0] // 2)
    x = checkpoint_name(x, SAVED_BY_REMAT)
    return dropout(x, options.dropout_rate, layer_key(key, 1)), LayerMoments(moments1, moments2)


def plain_dense_block(
    inputs: Float[Array, "b h w c"],
    layers: Sequence[LayerArrays],
    key: Array | None,
    options: BlockOptions,
    train: bool,
) -> BlockResult:
    """The reference form: every layer normalizes the whole concatenation before it; autodiff does the rest."""
    step = dense_layer
    if options.remat:
        policy = jax.checkpoint_policies.save_only_these_names(SAVED_BY_REMAT)
        step = jax.checkpoint(dense_layer, static_argnums=(3, 4), policy=policy)
    features: tuple[Array, ...] = (inputs,)
    moments = []
    for index, layer in enumerate(layers):
        new, seen = step(features, layer, layer_key(key, index), options, train)
        features = (*features, new)
        moments.append(seen)
    return BlockResult(FeatureMap(join(features)), tuple(moments))


class FoldedLayerArrays(NamedTuple):
    """One dense layer with its batch norms folded; bias2 and kernel2 are None without a bottleneck."""

    scale1: Array
    bias1: Array
    kernel1: Array
    bias2: Array | None = None
    kernel2: Array | None = None


def folded_dense_block(
    inputs: Float[Array, "b h w c"], layers: Sequence[FoldedLayerArrays], dtype: DType
) -> Float[Array, "b h w c2"]:
    """The block in evaluation: scale and shift, ReLU, 1x1 convolution with bias, ReLU, 3x3 convolution."""
    features: tuple[Array, ...] = (inputs,)
    for layer in layers:
        x = jax.nn.relu(folded_norm(join(features), layer.scale1, layer.bias1, dtype))
        x = convolve(x, layer.kernel1, padding=layer.kernel1.shape[0] // 2)
        if layer.bias2 is not None and layer.kernel2 is not None:
            x = jax.nn.relu(folded_norm(x, None, layer.bias2, dtype))
            x = convolve(x, layer.kernel2, padding=layer.kernel2.shape[0] // 2)
        features = (*features, x)
    return join(features)


class DenseLayer(nn.Module):
    """The parameters of one dense layer: norm1, conv1 and, with a bottleneck, norm2 and conv2."""

    in_features: int
    growth_rate: int
    bottleneck_width: int
    norm_options: NormOptions
    init_fan: Fan
    dtype: DType
    param_dtype: DType

    def setup(self) -> None:
        """Declares the layer's norms and convolutions."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernels = {"init_fan": self.init_fan, **types}
        self.norm1 = BatchNorm(self.in_features, self.norm_options, **types)
        if not self.bottleneck_width:
            self.conv1 = Convolution(self.in_features, self.growth_rate, 3, **kernels)
            return
        width = self.bottleneck_width * self.growth_rate
        self.conv1 = Convolution(self.in_features, width, 1, **kernels)
        self.norm2 = BatchNorm(width, self.norm_options, after_convolution=True, **types)
        self.conv2 = Convolution(width, self.growth_rate, 3, **kernels)

    def arrays(self) -> LayerArrays:
        """All arrays of the layer."""
        first = (self.norm1.arrays(), self.conv1.kernel)
        if not self.bottleneck_width:
            return LayerArrays(*first)
        return LayerArrays(*first, self.norm2.arrays(), self.conv2.kernel)

    def folded_arrays(self) -> FoldedLayerArrays:
        """All arrays of the layer where its norms are folded."""
        first = (self.norm1.scale, self.norm1.bias, self.conv1.kernel)
        if not self.bottleneck_width:
            return FoldedLayerArrays(*first)
        return FoldedLayerArrays(*first, self.norm2.bias, self.conv2.kernel)

    def record(self, moments: LayerMoments, positions: int) -> None:
        """Takes a training step's moments, over positions values a channel in the whole batch, into the statistics."""
        if moments.norm1 is not None:
            self.norm1.record(moments.norm1, positions // moments.norm1.mean.shape[0])
        if moments.norm2 is not None:
            self.norm2.record(moments.norm2, positions // moments.norm2.mean.shape[0])


class DenseBlock(nn.Module):
    """num_layers dense layers on one map size (1608.06993, section 3).

    Declares denselayer{1..n}/{norm1,conv1,norm2,conv2}, whichever form computes the output.
    """

    num_layers: int
    growth_rate: int
    bottleneck_width: int = 4
    init_fan: Fan = "fan_in"
    options: BlockOptions = BlockOptions()
    param_dtype: DType = jnp.float32
    form: Form = plain_dense_block

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> FeatureMap:
        """The concatenation of the input and all layers' outputs: float[b, h, w, c + num_layers * growth_rate]."""
        layers = [
            DenseLayer(
                x.shape[-1] + index * self.growth_rate,
                self.growth_rate,
                self.bottleneck_width,
                self.options.norm,
                self.init_fan,
                self.options.dtype,
                self.param_dtype,
                name=f"denselayer{index + 1}",
            )
            for index in range(self.num_layers)
        ]
        if self.options.norm.folded:
            folded = [layer.folded_arrays() for layer in layers]
            return FeatureMap(folded_dense_block(x, folded, self.options.dtype))
        key = self.make_rng("dropout") if train and self.options.dropout_rate else None
        result = self.form(x, [layer.arrays() for layer in layers], key, self.options, train)
        for layer, moments in zip(layers, result.moments, strict=True):
            layer.record(moments, x.shape[0] * x.shape[1] * x.shape[2])
        return result.features
