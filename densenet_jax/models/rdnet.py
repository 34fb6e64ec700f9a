"""RDNet, the DenseNet of "DenseNets Reloaded" (2403.19588), in plain JAX: dense layer, stage, patch stem, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType, wide
from densenet_jax.models.head import HeadOptions, Output, check_size, select_output, tap
from densenet_jax.models.layers import convolve, dropout, fold_key, global_average_pool, he_normal


class LayerNorm(nn.Module):
    """Layer normalization over channels, the last axis, in float32 or wider; parameters scale and bias, float[c]."""

    epsilon: float
    dtype: DType
    param_dtype: DType

    @nn.compact
    def arrays(self, features: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Returns scale and bias."""
        scale = self.param("scale", nn.initializers.ones, (features,), self.param_dtype)
        return scale, self.param("bias", nn.initializers.zeros, (features,), self.param_dtype)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """Normalizes, scales and shifts; the result has the module's dtype."""
        return normalize_channels(x, x, *self.arrays(x.shape[-1]), self.epsilon).astype(self.dtype)


def normalize_channels(
    x: Float[Array, "*b c"], like: Float[Array, "*b2 c"], scale: Array, bias: Array, epsilon: float
) -> Float[Array, "*b c"]:
    """Returns x less its mean over channels, over the deviation of `like`, scaled and shifted, in float32 or wider."""
    kind = wide(x.dtype)
    x, like = x.astype(kind), like.astype(kind)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.var(like, axis=-1, keepdims=True)
    axes = tuple(range(x.ndim - 1))
    scale, bias = (jnp.expand_dims(value.astype(kind), axes) for value in (scale, bias))
    return centered * jax.lax.rsqrt(var + epsilon) * scale + bias


def spread_norm(
    features: Float[Array, "b h w c"], scale: Array, bias: Array, epsilon: float
) -> Float[Array, "b h w c"]:
    """Applies the norm behind the pooling to every position, so that the mean is the norm of the pooled features.

    The pooled features' own deviation divides every position, and all else in the norm is linear.
    """
    pooled = jnp.mean(features, axis=(1, 2), keepdims=True, dtype=wide(features.dtype))
    return normalize_channels(features, pooled, scale, bias, epsilon)


class Convolution(nn.Module):
    """Convolution with a bias; parameters kernel float[k, k, in / groups, out] and bias float[out]."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    convolve: Callable[..., Array] = convolve

    @nn.compact
    def arrays(self, in_features: int) -> tuple[Float[Array, "k k i o"], Float[Array, " o"]]:
        """Returns kernel and bias, which is drawn as torch draws it."""
        shape = (self.kernel_size, self.kernel_size, in_features // self.groups, self.features)
        reach = (self.kernel_size**2 * shape[2]) ** -0.5
        kernel = self.param("kernel", he_normal("fan_in"), shape, self.param_dtype)
        bias = self.param(
            "bias",
            lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -reach, reach),
            (self.features,),
            self.param_dtype,
        )
        return kernel, bias

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        """Convolves in dtype."""
        x, (kernel, bias) = x.astype(self.dtype), self.arrays(x.shape[-1])
        y = self.convolve(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        return y + bias.astype(self.dtype)[None, None, None, :]


@dataclass(frozen=True)
class Plain:
    """Computes the costly parts of a network in plain JAX; other implementations have the same methods."""

    def convolve(self, x: Array, kernel: Array, *, stride: int, padding: int, groups: int) -> Array:
        """Convolves outside the dense layers: patches of the stem and of transitions."""
        return convolve(x, kernel, stride=stride, padding=padding, groups=groups)

    def depthwise_norm(self, depthwise: Convolution, norm: LayerNorm, x: Float[Array, "b h w c"]) -> Array:
        """Convolves depthwise and normalizes."""
        return norm(depthwise(x))

    def bottleneck(self, conv1: Convolution, conv2: Convolution, x: Float[Array, "b h w c"]) -> Array:
        """Convolves to the bottleneck and, behind the exact GELU, to the new feature maps."""
        return conv2(jax.nn.gelu(conv1(x), approximate=False))


PLAIN = Plain()


def round_width(features: float) -> int:
    """Rounds a number of feature maps down to a multiple of 8."""
    return int(features / 8) * 8


def drop_path(x: Float[Array, "b h w c"], rate: float, key: Array | None) -> Float[Array, "b h w c"]:
    """Zeroes whole examples at this rate and scales the rest (stochastic depth, 1603.09382); no key changes nothing."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], 1, 1, 1))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class DenseLayer(nn.Module):
    """Depthwise 7x7 convolution, norm, 1x1 to the bottleneck, GELU, 1x1 to growth_rate (2403.19588, section 3.2).

    Parameters depthwise, norm, conv1, conv2, with squeeze_excite also gate, and with a layer_scale above 0 gamma.

    Attributes:
        bottleneck_width: the first 1x1 convolution gives this many times the input's feature maps.
        squeeze_excite: multiply the output by a gate of its mean (effective squeeze and excite, 1911.06667).
        layer_scale: initial value of gamma, which multiplies the output.
        drop_rate: of dropout behind the layer.
        drop_path_rate: share of examples for which the layer's output is zero in training.
    """

    growth_rate: int
    bottleneck_width: float
    squeeze_excite: bool
    layer_scale: float
    drop_rate: float
    drop_path_rate: float
    epsilon: float
    types: dict[str, DType]
    implementation: Plain = PLAIN

    @nn.compact
    def __call__(
        self, features: tuple[Array, ...], key: Array | None = None, path_key: Array | None = None
    ) -> Float[Array, "b h w growth_rate"]:
        """Returns growth_rate new feature maps.

        Args:
            features: the stage's input and the earlier layers' outputs, each float[b, h, w, *].
            key: for dropout; None drops nothing, as for path_key.
        """
        x = jnp.concatenate(features, axis=-1)
        width = x.shape[-1]
        depthwise = Convolution(width, 7, padding=3, groups=width, name="depthwise", **self.types)
        x = self.implementation.depthwise_norm(depthwise, LayerNorm(self.epsilon, name="norm", **self.types), x)
        conv1 = Convolution(round_width(width * self.bottleneck_width), name="conv1", **self.types)
        x = self.implementation.bottleneck(conv1, Convolution(self.growth_rate, name="conv2", **self.types), x)
        if self.squeeze_excite:
            gate = Convolution(self.growth_rate, name="gate", **self.types)
            x = x * jax.nn.hard_sigmoid(gate(global_average_pool(x)[:, None, None, :]))
        if self.layer_scale > 0:
            init = nn.initializers.constant(self.layer_scale)
            gamma = self.param("gamma", init, (self.growth_rate,), self.types["param_dtype"])
            x = x * gamma.astype(x.dtype)[None, None, None, :]
        return dropout(drop_path(x, self.drop_path_rate, path_key), self.drop_rate, key)


class Stage(nn.Module):
    """Dense layers on feature maps of one size, behind norm and strided convolution in all stages but the first.

    Parameters norm and conv (the transition) and layer{1..n}.

    Attributes:
        transition: feature maps and stride of the transition's convolution; None has no transition.
        drop_path_rates: one a layer.
    """

    transition: tuple[int, int] | None
    growth_rate: int
    drop_path_rates: tuple[float, ...]
    layer: dict[str, Any]
    remat: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], keys: tuple[Array | None, Array | None]
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the transition's output (or the input) and all layers' outputs, concatenated."""
        if self.transition:
            width, stride = self.transition
            x = LayerNorm(self.layer["epsilon"], name="norm", **self.layer["types"])(x)
            convolve = self.layer["implementation"].convolve
            x = Convolution(width, stride, stride, name="conv", convolve=convolve, **self.layer["types"])(x)
        make_layer = nn.remat(DenseLayer) if self.remat else DenseLayer
        features: tuple[Array, ...] = (x,)
        for index, rate in enumerate(self.drop_path_rates):
            layer = make_layer(
                growth_rate=self.growth_rate, drop_path_rate=rate, name=f"layer{index + 1}", **self.layer
            )
            features = (*features, layer(features, *(fold_key(key, index) for key in keys)))
        return jnp.concatenate(features, axis=-1)


class Stem(nn.Module):
    """Convolution of patches without overlap, and norm; parameters conv and norm."""

    features: int
    patch_px: int
    epsilon: float
    types: dict[str, DType]
    implementation: Plain

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 features"]:
        """Returns one position a patch; a rest at the right and the bottom is left out."""
        options = {"convolve": self.implementation.convolve, **self.types}
        x = Convolution(self.features, self.patch_px, self.patch_px, name="conv", **options)(images)
        return LayerNorm(self.epsilon, name="norm", **self.types)(x)


class RDNet(nn.Module):
    """An RDNet; the attributes up to epsilon are those of variants.RDNetArchitecture.

    Parameters stem, stage{i}/..., norm (behind the pooling) and classifier. It has no batch statistics.

    Attributes:
        layer_dropout: rate behind every dense layer, in training.
        drop_path_rate: of the last dense layer, in training; it rises linearly from 0 at the first. Needs an rng
            "drop_path".
        output: as for `create_model`; a pyramid has raw outputs, "pooled" is normalized.
        remat: keep only the dense layers' outputs for the backward pass and compute the rest again.
        implementation: computes the costly parts.
    """

    block_sizes: tuple[int, ...]
    growth_rate: tuple[int, ...]
    halved_stages: tuple[int, ...]
    squeeze_excite_from: int
    stem_width: int
    patch_px: int
    bottleneck_width: float
    compression: float
    layer_scale: float
    epsilon: float
    head_options: HeadOptions = HeadOptions(1000)
    layer_dropout: float = 0.0
    drop_path_rate: float = 0.0
    output: Output = "logits"
    remat: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    implementation: Plain = PLAIN

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the feature maps that output may name: the stem's, and twice that with each halving."""
        halvings = sum(stage in range(len(self.block_sizes)) for stage in self.halved_stages)
        return tuple(self.patch_px * 2**halving for halving in range(halvings + 1))

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Any:
        """Returns logits (or what output names) of normalized images.

        Raises:
            UserError: the images are smaller than the strides allow.
        """
        height, width = images.shape[1:3]
        check_size(height, width, self.strides[-1])
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        key = self.make_rng("dropout") if train and self.layer_dropout else None
        path_key = self.make_rng("drop_path") if train and self.drop_path_rate else None
        stem = Stem(self.stem_width, self.patch_px, self.epsilon, types, self.implementation, name="stem")
        x = stem(images.astype(self.dtype))
        stride, pyramid = self.patch_px, {}
        for index in range(len(self.block_sizes)):
            stage = self._stage(index, x.shape[-1], types)
            if index in self.halved_stages:
                pyramid[stride] = x = tap(self, stride, x)
                stride *= 2
            x = stage(x, (fold_key(key, index), fold_key(path_key, index)))
        norm, x = LayerNorm(self.epsilon, name="norm", **types), tap(self, stride, x)
        return select_output(self.output, x, {**pyramid, stride: x}, self.head_options, train, self.make_rng, norm)

    @nn.nowrap
    def _stage(self, index: int, in_features: int, types: dict[str, DType]) -> Stage:
        last = max(sum(self.block_sizes) - 1, 1)
        first = sum(self.block_sizes[:index])
        rates = (self.drop_path_rate * (first + layer) / last for layer in range(self.block_sizes[index]))
        transition = None
        if index:
            transition = (round_width(in_features * self.compression), 2 if index in self.halved_stages else 1)
        layer = {
            "bottleneck_width": self.bottleneck_width,
            "squeeze_excite": index >= self.squeeze_excite_from,
            "layer_scale": self.layer_scale,
            "drop_rate": self.layer_dropout,
            "epsilon": self.epsilon,
            "types": types,
            "implementation": self.implementation,
        }
        return Stage(transition, self.growth_rate[index], tuple(rates), layer, self.remat, name=f"stage{index + 1}")
