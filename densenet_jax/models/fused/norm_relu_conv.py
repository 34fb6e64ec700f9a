"""relu(scale * x_hat + bias), convolved: its operands, its gradients and the operations that backends share.

The gradients recompute the ReLU's output instead of storing it. The sums over the batch that a batch norm's derivative
needs, of the gradient of x_hat and of that times x_hat, follow from the gradients of bias and scale.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.dtypes import wide
from densenet_jax.models.fused.norm import Normalization, Sums
from densenet_jax.models.layers import NormArrays, NormOptions, fold_running, scale_shift


class NormReluConv(NamedTuple):
    """Parameters of relu(scale * x_hat + bias), convolved: float[c], float[c], float[k, k, c / channel_groups, o]."""

    scale: Array
    bias: Array
    kernel: Array


class Window(NamedTuple):
    """Stride and channel groups of a convolution."""

    stride: int = 1
    channel_groups: int = 1


DENSE = Window()


class Operands(NamedTuple):
    """Operands of relu(scale * x_hat + bias), convolved, for the first c channels of x.

    Attributes:
        x: float[b, h, w, c2].
        norm: makes x_hat of x; None: x is normalized already.
    """

    x: Array
    conv: NormReluConv
    norm: Normalization | None = None
    window: Window = DENSE

    def x_hat(self) -> Float[Array, "b h w c"]:
        """Returns x_hat of the first c channels."""
        return apply_norm(self.x, self.norm)[..., : self.conv.scale.shape[0]]


class Gradients(NamedTuple):
    """Gradients of a `NormReluConv`, in float32 or wider.

    Attributes:
        x: float[b, h, w, c], of x_hat.
        scale, bias: float[g, c], a row for each group of examples; the parameter's gradient is the sum over rows.
    """

    x: Array
    scale: Array
    bias: Array
    kernel: Array

    def of_parameters(self, conv: NormReluConv) -> NormReluConv:
        """Returns the parameters' gradients in the parameters' dtypes."""
        return NormReluConv(
            self.scale.sum(axis=0).astype(conv.scale.dtype),
            self.bias.sum(axis=0).astype(conv.bias.dtype),
            self.kernel.astype(conv.kernel.dtype),
        )


def scale_and_bias(norm: NormArrays, options: NormOptions) -> tuple[Array, Array]:
    """Returns scale and bias for x_hat, or, if the norm is frozen, for x, with the running statistics folded in."""
    return fold_running(norm, options.epsilon) if norm.frozen else (norm.scale, norm.bias)


def norm_relu(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> Float[Array, "b h w c"]:
    """Returns relu(scale * x + bias), computed in float32 or wider, in x's dtype."""
    return jax.nn.relu(scale_shift(x, scale, bias, x.dtype))


def norm_relu_gradients(
    gradient: Float[Array, "b h w c"],
    activation: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    groups: int,
) -> tuple[Float[Array, "b h w c"], Float[Array, "g c"], Float[Array, "g c"]]:
    """Returns the gradients of x, scale and bias from that of activation = relu(scale * x + bias), float32 or wider."""
    dtype = wide(x.dtype)
    masked = jnp.where(activation > 0, gradient, jnp.zeros_like(gradient)).astype(dtype)
    grad_scale, grad_bias = sum_by_group(masked * x.astype(dtype), groups), sum_by_group(masked, groups)
    return masked * scale.astype(dtype)[None, None, None, :], grad_scale, grad_bias


def apply_norm(x: Float[Array, "b h w c"], norm: Normalization | None) -> Float[Array, "b h w c"]:
    """Returns x_hat; x itself without a norm."""
    return x if norm is None else norm.apply(x)


def sum_by_group(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "g c"]:
    """Sums over positions and the examples of each group, in float32 or wider."""
    grouped = x.astype(wide(x.dtype)).reshape(groups, -1, *x.shape[1:])
    return jnp.sum(grouped, axis=(1, 2, 3))


def sum_gradient(gradient: Float[Array, "b h w c"], x_hat: Float[Array, "b h w c"], groups: int) -> Sums:
    """Sums a gradient of x_hat, and the gradient times x_hat, over the examples of each group."""
    return sum_by_group(gradient, groups), sum_by_group(gradient.astype(wide(gradient.dtype)) * x_hat, groups)


def sums_from_gradients(
    scale: Float[Array, " c"], grad_scale: Float[Array, "g c"], grad_bias: Float[Array, "g c"]
) -> Sums:
    """Recovers those sums from the scale and bias gradients, without another pass."""
    scale = scale.astype(grad_scale.dtype)[None, :]
    return grad_bias * scale, grad_scale * scale
