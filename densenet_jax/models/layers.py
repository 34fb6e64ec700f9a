"""Convolution, batch normalization and pooling with the references' arithmetic, padding always explicit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.errors import UserError
from densenet_jax.kernels.cpu import convolution as cpu
from densenet_jax.kernels.cpu import pooling
from densenet_jax.kernels.dtypes import wide
from densenet_jax.models.space_to_depth import space_to_depth

DType = Any
Fan = Literal["fan_in", "fan_out"]


@dataclass(frozen=True)
class NormOptions:
    """How every batch norm of a network behaves.

    Attributes:
      epsilon: added to the variance.
      momentum: share of the old running statistic that an update keeps (0.9 is torch's 0.1).
      group_size: examples that share statistics in training; 0 is the whole batch.
      unbiased_running_variance: the running variance takes in the n-1 estimate, as in torch.
      frozen: regular expression; a batch norm in whose scale's name ("params/norm0/scale") it is found normalizes by
        its running statistics in training, too, and leaves them as they are. "" freezes none.
      folded: for evaluation only: the variables are those of `densenet_jax.models.fold`, without running statistics.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    group_size: int = 0
    unbiased_running_variance: bool = True
    frozen: str = ""
    folded: bool = False


class Moments(NamedTuple):
    """Mean and biased variance of a feature map, float[g, c], a row for each group of examples."""

    mean: Array
    variance: Array


class FeatureMap(NamedTuple):
    """A feature map float[b, h, w, c]; with moments set, its values are already normalized by them."""

    values: Array
    moments: Moments | None = None

    def raw(self, epsilon: float) -> Array:
        """The values before any normalization."""
        if self.moments is None:
            return self.values
        mean, variance = (per_example(m, self.values.shape[0]) for m in self.moments)
        return (self.values * jnp.sqrt(variance + epsilon) + mean).astype(self.values.dtype)


@flax.struct.dataclass
class NormArrays:
    """What a batch norm reads with: its parameters and running statistics, each float[c]; frozen: as if evaluating."""

    scale: Array
    bias: Array
    mean: Array
    variance: Array
    frozen: bool = flax.struct.field(pytree_node=False, default=False)


def per_example(groups: Float[Array, "g c"], batch: int) -> Float[Array, "_ 1 1 c"]:
    """One row a group to one row an example, or a single row that broadcasts where there is one group."""
    if groups.shape[0] > 1:
        groups = jnp.repeat(groups, batch // groups.shape[0], axis=0)
    return groups[:, None, None, :]


def group_count(batch: int, group_size: int) -> int:
    """Groups of group_size examples in a batch.

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


def batch_moments(x: Float[Array, "b h w c"], group_size: int, shift: Float[Array, " c"]) -> Moments:
    """Mean and biased variance over examples and positions, in float32 or wider, in one pass over x.

    The sums are of x - shift: with the running mean as shift they do not cancel, however far the mean is from zero.
    """
    groups = group_count(x.shape[0], group_size)
    kind = wide(x.dtype)
    shift = lax.stop_gradient(shift).astype(kind)
    centered = (x.astype(kind) - shift[None, None, None, :]).reshape(groups, -1, *x.shape[1:])
    mean = jnp.mean(centered, axis=(1, 2, 3))
    variance = jnp.maximum(jnp.mean(jnp.square(centered), axis=(1, 2, 3)) - jnp.square(mean), 0)
    return Moments(mean + shift[None, :], variance)


def normalize(x: Float[Array, "b h w c"], moments: Moments, epsilon: float) -> Float[Array, "b h w c"]:
    """(x - mean) / sqrt(variance + epsilon), in float32 or wider."""
    kind = wide(x.dtype)
    mean, variance = (per_example(m.astype(kind), x.shape[0]) for m in moments)
    return (x.astype(kind) - mean) * lax.rsqrt(variance + epsilon)


def scale_shift(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], dtype: DType
) -> Float[Array, "b h w c"]:
    """Scale * x + bias in float32 or wider, given back in dtype."""
    kind = wide(x.dtype)
    scale, bias = (v.astype(kind)[None, None, None, :] for v in (scale, bias))
    return (x.astype(kind) * scale + bias).astype(dtype)


def fold_running(norm: NormArrays, epsilon: float) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """The scale and bias that do to raw values what norming by the running statistics does, float32 or wider."""
    kind = wide(norm.variance.dtype)
    factor = norm.scale.astype(kind) * lax.rsqrt(norm.variance.astype(kind) + epsilon)
    return factor, norm.bias.astype(kind) - norm.mean.astype(kind) * factor


def norm_by_running(
    x: Float[Array, "b h w c"], norm: NormArrays, epsilon: float, dtype: DType
) -> Float[Array, "b h w c"]:
    """Batch norm with the running statistics, as in evaluation: one multiply and one add an element."""
    return scale_shift(x, *fold_running(norm, epsilon), dtype)


def folded_norm(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"] | None, bias: Float[Array, " c"], dtype: DType
) -> Float[Array, "b h w c"]:
    """A batch norm in evaluation with its statistics folded in; scale None: the convolution before it has taken it."""
    if scale is None:
        kind = wide(x.dtype)
        return (x.astype(kind) + bias.astype(kind)[None, None, None, :]).astype(dtype)
    return scale_shift(x, scale, bias, dtype)


def apply_norm(
    x: Float[Array, "b h w c"], norm: NormArrays, options: NormOptions, train: bool, dtype: DType
) -> tuple[Float[Array, "b h w c"], Moments | None]:
    """Batch norm of raw values: the result in dtype and, in training, the moments for the running statistics."""
    if not train or norm.frozen:
        return norm_by_running(x, norm, options.epsilon, dtype), None
    moments = batch_moments(x, options.group_size, norm.mean)
    return scale_shift(normalize(x, moments, options.epsilon), norm.scale, norm.bias, dtype), moments


class BatchNorm(nn.Module):
    """Batch normalization of float[b, h, w, features] with torch's running statistics.

    Parameters scale and bias, statistics mean and var in the collection "batch_stats", all float[features]. Folded, it
    has no statistics; after a convolution whose output nothing else reads, it has no scale either: the kernel holds it.
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
        kind = wide(self.param_dtype)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kind)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, kind)

    def arrays(self) -> NormArrays:
        """Parameters and running statistics, for code that does the arithmetic itself."""
        return NormArrays(self.scale, self.bias, self.mean.value, self.var.value, self._frozen())

    def _frozen(self) -> bool:
        pattern = self.options.frozen
        return bool(pattern) and re.search(pattern, "/".join(("params", *self.path, "scale"))) is not None

    def record(self, moments: Moments, count: int) -> None:
        """Takes one step's moments, each over count values, into the running statistics; groups are averaged."""
        if self.is_initializing():
            return
        variance = moments.variance
        if self.options.unbiased_running_variance:
            variance = variance * (count / max(count - 1, 1))
        keep = self.options.momentum
        for running, new in ((self.mean, moments.mean), (self.var, variance)):
            new = lax.stop_gradient(jnp.mean(new, axis=0)).astype(running.value.dtype)
            running.value = keep * running.value + (1 - keep) * new

    def __call__(self, x: FeatureMap | Array, train: bool) -> Float[Array, "b h w c"]:
        """Normalized values in dtype; a FeatureMap with moments is only scaled and shifted."""
        return folded_norm(*self.reading(x, train), self.dtype)

    def reading(self, x: FeatureMap | Array, train: bool) -> tuple[Array, Array | None, Array]:
        """Values, scale and bias of which scale * values + bias is the norm, for code that goes on from there.

        Values are float[b, h, w, c] in x's dtype or wider, scale and bias float[c]; scale None is 1. In training the
        running statistics take in the moments.
        """
        features = x if isinstance(x, FeatureMap) else FeatureMap(x)
        if self.options.folded:
            if train:
                raise UserError("a model with folded batch norms can't be trained; use the one it was made from")
            return features.raw(self.options.epsilon), None if self.after_convolution else self.scale, self.bias
        values, moments = features
        if not train or self._frozen():
            return features.raw(self.options.epsilon), *fold_running(self.arrays(), self.options.epsilon)
        if moments is None:
            moments = batch_moments(values, self.options.group_size, self.mean.value)
            values = normalize(values, moments, self.options.epsilon)
        self.record(moments, values.size // values.shape[-1] // moments.mean.shape[0])
        return values, self.scale, self.bias


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """2-D convolution padded by the same number of zeros on every side (XLA's SAME pads stride 2 unevenly)."""
    kernel = kernel.astype(x.dtype)
    if cpu.usable(x, kernel):
        return cpu.convolve(x, kernel, stride=stride, padding=padding, groups=groups)
    return cpu.plain_convolve(x, kernel, stride=stride, padding=padding, groups=groups)


def he_normal(fan: Fan) -> nn.initializers.Initializer:
    """He's initializer from an untruncated normal; fan is "fan_in" (torchvision) or "fan_out" (the paper's code)."""
    return nn.initializers.variance_scaling(2.0, fan, "normal")


class Convolution(nn.Module):
    """Bias-free convolution, padded to keep the size at stride 1; parameter kernel float[k, k, in / groups, out].

    Attributes:
      space_to_depth: at stride 2, compute it as `densenet_jax.models.space_to_depth` says: up to rounding the same.
    """

    in_features: int
    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    init_fan: Fan = "fan_in"
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    space_to_depth: bool = False

    def setup(self) -> None:
        """Declares parameters and variables."""
        shape = (self.kernel_size, self.kernel_size, self.in_features // self.groups, self.features)
        self.kernel = self.param("kernel", he_normal(self.init_fan), shape, self.param_dtype)

    def __call__(
        self, x: Float[Array, "b h w c"], signs: Float[Array, " o"] | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """The convolution in dtype, each output channel multiplied by its sign where signs are given."""
        kernel = self.kernel if signs is None else self.kernel * signs.astype(self.kernel.dtype)[None, None, None, :]
        padding = self.kernel_size // 2
        if self.space_to_depth:
            return convolve(*space_to_depth(x.astype(self.dtype), kernel))
        return convolve(x.astype(self.dtype), kernel, stride=self.stride, padding=padding, groups=self.groups)


def max_pool(x: Float[Array, "b h w c"], stride: int = 2, *, repeat_border: bool = False) -> Float[Array, "b h2 w2 c"]:
    """3x3 maximum, padded by one on every side.

    With repeat_border the border is repeated and nothing is padded, for exporters that lose a pooling's padding. The
    result is the same to the bit: a window that reaches over the border holds the border already.
    """
    if not repeat_border:
        if pooling.usable(x):
            return pooling.max_pool(x, 3, stride)
        return pooling.plain_max_pool(x, window=3, stride=stride)
    for axis in (1, 2):
        size = x.shape[axis]
        first, last = (lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, size - 1))
        x = jnp.concatenate([first, x, last], axis=axis)
    return nn.max_pool(x, window_shape=(3, 3), strides=(stride, stride))


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2 mean at stride 2; an odd last row or column is left out, as in the references."""
    return nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))


def blur_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """[1, 2, 1] x [1, 2, 1] / 16 at stride 2 over a border reflected by one (1904.11486)."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    for axis in (1, 2):
        end = x.shape[axis] - 2
        first, middle, last = (lax.slice_in_dim(x, i, end + i, 2, axis) for i in range(3))
        x = (first + last) * 0.25 + middle * 0.5
    return x


def global_average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Mean over all positions, summed in float32 or wider, given back in x's dtype."""
    return jnp.mean(x, axis=(1, 2), dtype=wide(x.dtype)).astype(x.dtype)


def dropout(x: Array, rate: float, key: jax.Array | None) -> Array:
    """Zeroes a share of the values and scales the rest; no key or rate 0 changes nothing."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
