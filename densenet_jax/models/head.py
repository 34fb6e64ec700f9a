"""Pooling, dropout and classifier: from the last feature map to logits, for every network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType, wide
from densenet_jax.errors import UserError
from densenet_jax.models.layers import dropout, global_average_pool

OUTPUTS = ("logits", "pooled", "map", "pyramid")
INTERMEDIATES, PERTURBATIONS = "intermediates", "perturbations"  # collections of flax, see `tap`
GLOBAL_POOLS = ("avg", "max", "avgmax", "catavgmax")  # timm's names
Output = str | tuple[int, ...]  # one of OUTPUTS, or strides of feature maps


@dataclass(frozen=True)
class HeadOptions:
    """Settings of the head.

    Attributes:
        dropout_rate: between pooling and classifier, in training.
        test_time_pool_px: as for `create_model`; 0 is off.
        global_pool: one of GLOBAL_POOLS.
    """

    num_classes: int
    dropout_rate: float = 0.0
    test_time_pool_px: int = 0
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    global_pool: str = "avg"


class Classifier(nn.Module):
    """Linear layer from pooled features to logits, float32 or wider; kernel float[c, k] as torch's Linear draws it."""

    num_classes: int
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b k"]:
        """Returns logits of pooled features."""
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", init, (x.shape[-1], self.num_classes), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,), self.param_dtype)
        dtype = wide(self.dtype)
        logits = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=dtype)
        return logits + jnp.expand_dims(bias.astype(dtype), tuple(range(logits.ndim - 1)))


def _windows(x: Float[Array, "b h w c"], window_px: int) -> Float[Array, "b h2 w2 c"]:
    if min(x.shape[1:3]) < window_px:
        raise UserError(
            f"test_time_pool_px={window_px} is larger than the last feature map of {x.shape[1]}x{x.shape[2]}; "
            "give larger images or 0"
        )
    return nn.avg_pool(x, window_shape=(window_px, window_px))


def tap(module: nn.Module, stride: int, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Marks a level of the pyramid, so that it and the gradient with respect to it are at hand beside the logits.

    With `mutable=["intermediates"]`, `apply` returns x there as "stride_N"; an array of that name in the collection
    "perturbations" is added to x. Without them nothing is computed.
    """
    name = f"stride_{stride}"
    if module.has_variable(PERTURBATIONS, name):
        x = x + module.get_variable(PERTURBATIONS, name)
    module.sow(INTERMEDIATES, name, x)
    return x


def pool_globally(x: Float[Array, "b h w c"], kind: str) -> Float[Array, "b c2"]:
    """Returns the mean over all positions, the maximum, the mean of both, or both one after the other (c2 = 2c)."""
    if kind == "avg":
        return global_average_pool(x)
    largest = jnp.max(x, axis=(1, 2))
    if kind == "max":
        return largest
    mean = global_average_pool(x)
    return 0.5 * (mean + largest) if kind == "avgmax" else jnp.concatenate([mean, largest], axis=-1)


def check_size(height: int, width: int, smallest: int) -> None:
    """Checks that images are large enough for a network's strides.

    Raises:
        UserError: a side is below the smallest, in pixels.
    """
    if min(height, width) < smallest:
        raise UserError(
            f"images of {height}x{width} pixels are too small: this network halves the feature map until nothing is "
            f"left; give it at least {smallest}x{smallest}"
        )


def has_stride(output: Output, stride: int, *, by_default: bool = True) -> bool:
    """Whether output holds the feature map of this stride; by_default, whether "pyramid" does."""
    return stride in output if isinstance(output, tuple) else by_default and output == "pyramid"


def check_output(output: Any, strides: Sequence[int], name: str) -> None:
    """Checks what a network is to return.

    Raises:
        UserError: it is none of OUTPUTS, and no tuple of some of the network's strides.
    """
    if not isinstance(output, tuple):
        if output not in OUTPUTS:
            raise UserError(f"output={output!r}: expected one of {', '.join(OUTPUTS)}, or strides such as (4, 8)")
    elif not output or any(stride not in strides for stride in output):
        known = ", ".join(map(str, strides))
        raise UserError(f"output={output}: expected some of the strides of {name}'s feature maps: {known}")


def select_output(
    output: Output,
    x: Float[Array, "b h w c"],
    pyramid: dict[int, Array],
    options: HeadOptions,
    train: bool,
    make_rng: Callable[[str], Array],
    norm: Callable[[Array], Array] = lambda pooled: pooled,
) -> Any:
    """Returns what output names; called inside a module, it may declare its child "classifier".

    Args:
        x: the last feature map.
        norm: of the pooled features (RDNet).
    """
    if output == "pyramid":
        return pyramid
    if isinstance(output, tuple):
        return {stride: pyramid[stride] for stride in output}
    if output == "map":
        return x
    if output == "pooled":
        return norm(pool_globally(x, options.global_pool))
    classifier = Classifier(options.num_classes, options.dtype, options.param_dtype, name="classifier")
    if options.test_time_pool_px and not train:
        logits = classifier(norm(_windows(x, options.test_time_pool_px)))
        return 0.5 * (logits.mean(axis=(1, 2)) + logits.max(axis=(1, 2)))
    pooled = norm(pool_globally(x, options.global_pool))
    if train and options.dropout_rate:
        pooled = dropout(pooled, options.dropout_rate, make_rng("dropout"))
    return classifier(pooled)
