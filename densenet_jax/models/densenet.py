"""DenseNet for images of any size (1608.06993): stem, dense blocks, transitions, head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from densenet_jax.errors import UserError
from densenet_jax.models.arithmetic import Arithmetic, arithmetic_of, rearranges_stem
from densenet_jax.models.dense_block import BlockOptions, DenseBlock, Form, plain_dense_block
from densenet_jax.models.head import HeadOptions, classify
from densenet_jax.models.layers import (
    BatchNorm,
    Convolution,
    DType,
    Fan,
    FeatureMap,
    NormOptions,
    average_pool,
    blur_pool,
    dropout,
    global_average_pool,
    max_pool,
)
from densenet_jax.models.normalize_once import normalize_once
from densenet_jax.models.pooled_norms import norm_relu_max_pool, read_pooled
from densenet_jax.models.readers import Reader

STEMS = ("plain", "deep", "deep_tiered", "cifar")


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution to fewer maps, then pooling to half the size; parameters norm and conv.

    Without arithmetic in the papers' order; with it pooling comes before the convolution, which exchanges with it.
    """

    features: int
    options: BlockOptions
    blur: bool
    init_fan: Fan
    param_dtype: DType
    arithmetic: Arithmetic | None = None

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool) -> Float[Array, "b h w c"]:
        """Features float[b, h // 2, w // 2, features]."""
        width = x.values.shape[-1]
        dtype = self.options.dtype
        types = {"dtype": dtype, "param_dtype": self.param_dtype}
        pool = blur_pool if self.blur else average_pool
        norm = BatchNorm(width, self.options.norm, name="norm", **types)
        convolution = Convolution(width, self.features, init_fan=self.init_fan, name="conv", **types)
        rate = self.options.dropout_rate
        if train and rate and self.options.dropout_every_convolution:
            return pool(dropout(convolution(jax.nn.relu(norm(x, train))), rate, self.make_rng("dropout")))
        if self.arithmetic is None:
            return pool(convolution(jax.nn.relu(norm(x, train))))
        if self.blur or self.options.norm.folded:
            return convolution(pool(jax.nn.relu(norm(x, train))))
        values, scale, bias = norm.reading(x, train)
        assert scale is not None  # which is folded away behind a convolution only
        return read_pooled(values.astype(dtype), Reader(scale, bias, convolution.kernel), self.arithmetic)


class DenseNet(nn.Module):
    """A DenseNet; the attributes up to init_fan are those of variants.DenseNetArchitecture.

    Parameters are named as in the published PyTorch checkpoints: conv0, norm0, denseblock{i}/denselayer{j}/...,
    transition{i}/..., norm5, classifier.

    Attributes:
      norm_options: of all batch norms.
      head_options: of pooling and classifier.
      layer_dropout: rate after convolutions, in training.
      dropout_every_convolution: after every convolution but the first, as in the paper; otherwise after each dense
        layer's last.
      output: "logits" float32[b, k], "pooled" [b, c], "map" [b, h, w, c], or "pyramid", a dict from each stage's stride
        to its map (raw block outputs; the last one normalized and rectified).
      remat: of a dense block, keep x^ only and recompute its 1x1 convolutions in the backward pass (the plain form
        keeps convolutions' outputs and recomputes concatenations and norms, 1707.06990).
      dtype: of activations; param_dtype: of parameters.
      block_form: the arithmetic of dense blocks; with `plain_dense_block` stem and transitions are plain as well.
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
    block_form: Form = normalize_once

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> Any:
        """Logits (or what output names) of normalized images float[b, h, w, channels].

        Raises:
          UserError: the images are smaller than the strides allow.
        """
        self._check_size(*images.shape[1:3])
        options = BlockOptions(
            self.norm_options, self.dtype, self.layer_dropout, self.dropout_every_convolution, self.remat
        )
        x = self._stem(images.astype(self.dtype), train)
        stride = 1 if self.stem == "cifar" else 4
        pyramid = {}
        for index, num_layers in enumerate(self.block_sizes, 1):
            features = DenseBlock(
                num_layers,
                self.growth_rate,
                self.bottleneck_width,
                self.init_fan,
                options,
                self.param_dtype,
                self.block_form,
                name=f"denseblock{index}",
            )(x, train)
            if index < len(self.block_sizes):
                if self.output == "pyramid":
                    pyramid[stride] = features.raw(self.norm_options.epsilon)
                width = int(features.values.shape[-1] * self.compression)
                x = Transition(
                    width,
                    options,
                    self.blur == "all",
                    self.init_fan,
                    self.param_dtype,
                    arithmetic_of(self.block_form, plain_dense_block),
                    name=f"transition{index}",
                )(features, train)
                stride *= 2
        x = jax.nn.relu(self._norm("norm5", features.values.shape[-1])(features, train))
        if self.output == "pyramid":
            return {**pyramid, stride: x}
        if self.output == "map":
            return x
        if self.output == "pooled":
            return global_average_pool(x)
        return classify(x, self.head_options, train, self.make_rng)

    @nn.nowrap
    def _norm(self, name: str, features: int, *, after_convolution: bool = False) -> BatchNorm:
        return BatchNorm(features, self.norm_options, self.dtype, self.param_dtype, after_convolution, name=name)

    @nn.nowrap
    def _stem(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
        last = self.stem_width or 2 * self.growth_rate
        k = self.growth_rate
        kernel_size, widths = {
            "plain": (7, (last,)),
            "deep": (3, (k, k, last)),
            "deep_tiered": (3, (3 * (k // 4), 6 * (k // 4), last)),
            "cifar": (3, (last,)),
        }[self.stem]
        types = {"init_fan": self.init_fan, "dtype": self.dtype, "param_dtype": self.param_dtype}
        arithmetic = arithmetic_of(self.block_form, plain_dense_block)
        for index, width in enumerate(widths):
            stride = 2 if index == 0 and self.stem != "cifar" else 1
            rearranged = stride == 2 and rearranges_stem(arithmetic)
            convolution = Convolution(
                x.shape[-1], width, kernel_size, stride, space_to_depth=rearranged, name=f"conv{index}", **types
            )
            if self.stem == "cifar":
                return convolution(x)
            norm = self._norm(f"norm{index}", width, after_convolution=True)
            if index + 1 == len(widths) and self.blur == "none" and arithmetic:
                return norm_relu_max_pool(convolution, norm, x, train, arithmetic)
            x = jax.nn.relu(norm(convolution(x), train))
        border = self.norm_options.folded
        if self.blur == "none":
            return max_pool(x, repeat_border=border)
        return blur_pool(max_pool(x, stride=1, repeat_border=border))

    @nn.nowrap
    def _check_size(self, height: int, width: int) -> None:
        halvings = 2 ** (len(self.block_sizes) - 1)
        smallest = halvings if self.stem == "cifar" else 4 * (halvings - 1) + 1
        if min(height, width) < smallest:
            raise UserError(
                f"images of {height}x{width} pixels are too small: this network halves the map until nothing is "
                f"left; give it at least {smallest}x{smallest}"
            )
