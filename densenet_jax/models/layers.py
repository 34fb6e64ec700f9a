"""Convolution, batch normalization, pooling and dropout in plain JAX, with the references' explicit padding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType, wide
from densenet_jax.errors import UserError
from densenet_jax.models.variants import Fan

SAVED_BY_REMAT = "convolution"  # name of the values that rematerialization keeps


@dataclass(frozen=True)
class NormOptions:
    """Settings of every batch norm of a network.

    Attributes:
        momentum: share of the old running statistic that an update keeps (0.9 is torch's 0.1).
        group_size: examples that share statistics in training; 0 is the whole batch.
        unbiased_running_variance: update the running variance with the n-1 estimate, as torch does.
        frozen: regular expression; a batch norm whose scale's name ("params/norm0/scale") matches it normalizes by its
            running statistics in training too, and leaves them as they are. "" freezes none.
        folded: for evaluation only: the variables are those of `densenet_jax.models.fold`, without running statistics.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    group_size: int = 0
    unbiased_running_variance: bool = True
    frozen: str = ""
    folded: bool = False


class BatchStats(NamedTuple):
    """Mean and biased variance of a feature map, float[g, c], a row for each group of examples."""

    mean: Array
    var: Array


class FeatureMap(NamedTuple):
    """A feature map float[b, h, w, c]; with stats set, its values are already normalized by them."""

    values: Array
    stats: BatchStats | None = None

    def raw(self, epsilon: float) -> Array:
        """Returns the values before any normalization."""
        if self.stats is None:
            return self.values
        mean, var = (per_example(s, self.values.shape[0]) for s in self.stats)
        return (self.values * jnp.sqrt(var + epsilon) + mean).astype(self.values.dtype)


@flax.struct.dataclass
class NormArrays:
    """Parameters and running statistics of a batch norm, each float[c]; frozen: evaluates in training too."""

    scale: Array
    bias: Array
    mean: Array
    var: Array
    frozen: bool = flax.struct.field(pytree_node=False, default=False)


def per_example(groups: Float[Array, "g c"], batch: int) -> Float[Array, "_ 1 1 c"]:
    """Repeats the rows of groups for their examples; a single group stays one row, which broadcasts."""
    if groups.shape[0] > 1:
        groups = jnp.repeat(groups, batch // groups.shape[0], axis=0)
    return groups[:, None, None, :]


def group_count(batch: int, group_size: int) -> int:
    """Returns how many groups of group_size examples a batch has.

    Raises:
        UserError: the batch does not divide into groups of that size.
    """
    if group_size <= 0 or group_size >= batch:
        return 1
    if batch % group_size:
        raise UserError(
            f"batch_norm_group_size={group_size} does not divide the batch of {batch} examples; "
            "choose a divisor, or 0 for statistics of the whole batch"
        )
    return batch // group_size


def compute_stats(x: Float[Array, "b h w c"], group_size: int, shift: Float[Array, " c"]) -> BatchStats:
    """Computes mean and biased variance over examples and positions in one pass, in float32 or wider.

    The sums are of x - shift: with the running mean as shift they do not cancel, however far the mean is from zero.
    """
    groups = group_count(x.shape[0], group_size)
    dtype = wide(x.dtype)
    shift = lax.stop_gradient(shift).astype(dtype)
    centered = (x.astype(dtype) - shift[None, None, None, :]).reshape(groups, -1, *x.shape[1:])
    mean = jnp.mean(centered, axis=(1, 2, 3))
    var = jnp.maximum(jnp.mean(jnp.square(centered), axis=(1, 2, 3)) - jnp.square(mean), 0)
    return BatchStats(mean + shift[None, :], var)


def normalize(x: Float[Array, "b h w c"], stats: BatchStats, epsilon: float) -> Float[Array, "b h w c"]:
    """Returns (x - mean) / sqrt(var + epsilon), in float32 or wider."""
    dtype = wide(x.dtype)
    mean, var = (per_example(s.astype(dtype), x.shape[0]) for s in stats)
    return (x.astype(dtype) - mean) * lax.rsqrt(var + epsilon)


def scale_shift(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"] | None, bias: Float[Array, " c"], dtype: DType
) -> Float[Array, "b h w c"]:
    """Returns scale * x + bias, computed in float32 or wider, cast to dtype; scale None is 1."""
    kind = wide(x.dtype)
    if scale is None:
        return (x.astype(kind) + bias.astype(kind)[None, None, None, :]).astype(dtype)
    scale, bias = (v.astype(kind)[None, None, None, :] for v in (scale, bias))
    return (x.astype(kind) * scale + bias).astype(dtype)


def fold_running(norm: NormArrays, epsilon: float) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Returns the scale and bias that normalize raw values by the running statistics, in float32 or wider."""
    dtype = wide(norm.var.dtype)
    scale = norm.scale.astype(dtype) * lax.rsqrt(norm.var.astype(dtype) + epsilon)
    return scale, norm.bias.astype(dtype) - norm.mean.astype(dtype) * scale


class BatchNorm(nn.Module):
    """Batch normalization of float[b, h, w, features] with torch's running statistics.

    Parameters scale and bias, statistics mean and var in the collection "batch_stats", all float[features]. Folded, it
    has no statistics, and no scale either after a convolution whose output nothing else reads: the kernel holds it.
    """

    features: int
    options: NormOptions = NormOptions()
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    after_convolution: bool = False

    def setup(self) -> None:
        """Declares parameters and variables."""
        shape = (self.features,)
        if not (self.options.folded and self.after_convolution):
            self.scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        self.bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        if self.options.folded:
            return
        dtype = wide(self.param_dtype)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)

    def __call__(self, x: FeatureMap | Array, train: bool) -> Float[Array, "b h w c"]:
        """Returns normalized values in dtype; a FeatureMap with statistics is only scaled and shifted."""
        return scale_shift(*self.affine(x, train), self.dtype)

    def affine(self, x: FeatureMap | Array, train: bool) -> tuple[Array, Array | None, Array]:
        """Returns values, scale and bias: scale * values + bias is the norm's output.

        Values are float[b, h, w, c] in x's dtype or wider, scale and bias float[c]; scale None is 1. In training the
        running statistics are updated.

        Raises:
            UserError: in training with folded norms.
        """
        features = x if isinstance(x, FeatureMap) else FeatureMap(x)
        if self.options.folded:
            if train:
                raise UserError("a model with folded batch norms can't be trained; use the one it was made from")
            return features.raw(self.options.epsilon), None if self.after_convolution else self.scale, self.bias
        values, stats = features
        if not train or self.is_frozen():
            return features.raw(self.options.epsilon), *fold_running(self.arrays(), self.options.epsilon)
        if stats is None:
            stats = compute_stats(values, self.options.group_size, self.mean.value)
            values = normalize(values, stats, self.options.epsilon)
        self.update_running(stats, values.size // values.shape[-1])
        return values, self.scale, self.bias

    def arrays(self) -> NormArrays:
        """Returns parameters and running statistics."""
        return NormArrays(self.scale, self.bias, self.mean.value, self.var.value, self.is_frozen())

    def is_frozen(self) -> bool:
        """Whether the norm uses its running statistics in training too."""
        pattern = self.options.frozen
        return bool(pattern) and re.search(pattern, "/".join(("params", *self.path, "scale"))) is not None

    def update_running(self, stats: BatchStats | None, positions: int) -> None:
        """Updates the running statistics by the groups' mean, if stats is set; positions are values a channel."""
        if stats is None or self.is_initializing():
            return
        count, var = positions // stats.mean.shape[0], stats.var
        if self.options.unbiased_running_variance:
            var = var * (count / max(count - 1, 1))
        keep = self.options.momentum
        for running, new in ((self.mean, stats.mean), (self.var, var)):
            new = lax.stop_gradient(jnp.mean(new, axis=0)).astype(running.value.dtype)
            running.value = keep * running.value + (1 - keep) * new


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Convolves in 2-D with the same zero padding on every side (XLA's SAME pads stride 2 unevenly)."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        [(padding, padding), (padding, padding)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def he_normal(fan: Fan) -> nn.initializers.Initializer:
    """Returns He's untruncated normal initializer; fan is "fan_in" (torchvision) or "fan_out" (the paper's code)."""
    return nn.initializers.variance_scaling(2.0, fan, "normal")


class Convolution(nn.Module):
    """Bias-free convolution, padded to keep the size at stride 1; parameter kernel float[k, k, in / groups, out]."""

    in_features: int
    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    init_fan: Fan = "fan_in"
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    def setup(self) -> None:
        """Declares the kernel."""
        shape = (self.kernel_size, self.kernel_size, self.in_features // self.groups, self.features)
        self.kernel = self.param("kernel", he_normal(self.init_fan), shape, self.param_dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        """Convolves in dtype."""
        padding = self.kernel_size // 2
        return convolve(x.astype(self.dtype), self.kernel, stride=self.stride, padding=padding, groups=self.groups)


def max_pool(x: Float[Array, "b h w c"], stride: int = 2, *, repeat_border: bool = False) -> Float[Array, "b h2 w2 c"]:
    """Takes the maximum over 3x3 windows, padded by one on every side.

    With repeat_border the border is repeated and nothing is padded, for exporters that lose a pooling's padding. The
    result is the same to the bit: a window that reaches over the border holds the border already.
    """
    if not repeat_border:
        return nn.max_pool(x, window_shape=(3, 3), strides=(stride, stride), padding=((1, 1), (1, 1)))
    for axis in (1, 2):
        size = x.shape[axis]
        first, last = (lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, size - 1))
        x = jnp.concatenate([first, x, last], axis=axis)
    return nn.max_pool(x, window_shape=(3, 3), strides=(stride, stride))


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Takes 2x2 means at stride 2; an odd last row or column is left out, as in the references."""
    return nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))


def blur_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Blurs by [1, 2, 1] x [1, 2, 1] / 16 at stride 2 over a border reflected by one (1904.11486)."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    for axis in (1, 2):
        end = x.shape[axis] - 2
        first, middle, last = (lax.slice_in_dim(x, i, end + i, 2, axis) for i in range(3))
        x = (first + last) * 0.25 + middle * 0.5
    return x


def global_average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Returns the mean over all positions, summed in float32 or wider, in x's dtype."""
    return jnp.mean(x, axis=(1, 2), dtype=wide(x.dtype)).astype(x.dtype)


def dropout(x: Array, rate: float, key: jax.Array | None) -> Array:
    """Zeroes a share of the values and scales the rest; no key or rate 0 changes nothing."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def fold_key(key: Array | None, index: int) -> Array | None:
    """Derives the dropout key of one layer or convolution; None stays None."""
    return None if key is None else jax.random.fold_in(key, index)
