"""The costly parts of an RDNet, computed by compiled kernels on a CPU.

A dense layer is two calls: depthwise convolution with layer norm, and both 1x1 convolutions with the GELU in between.
Convolutions of patches become products of matrices. Where the kernels don't serve (other platforms, several devices,
dtypes other than float32, exports) it is `rdnet.Plain`, whose function this is, with the GELU computed again in the
backward pass, for a TPU by erf; in float64 the depthwise convolutions are sums of shifted products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.dtypes import wide
from densenet_jax.kernels.cpu import dense_layer
from densenet_jax.kernels.cpu.convolution import convolve_fast, is_usable
from densenet_jax.kernels.cpu.primitive import is_plain
from densenet_jax.models import rdnet


@dataclass(frozen=True)
class FusedRDNet(rdnet.Plain):
    """Computes what `rdnet.Plain` computes, faster on a CPU, and compiled sooner for a TPU.

    Attributes:
        platform: "cpu", "gpu" or "tpu"; "" is the platform that JAX runs on.
    """

    platform: str = ""

    def convolve(self, x: Array, kernel: Array, *, stride: int, padding: int, groups: int) -> Array:
        """Convolves patches without overlap as one product of matrices."""
        kernel = kernel.astype(x.dtype)
        if stride > 1 and kernel.shape[0] == stride and not padding and is_usable(x, kernel):
            x, kernel, stride = _split_into_patches(x, stride), kernel.reshape(1, 1, -1, kernel.shape[3]), 1
        return convolve_fast(x, kernel, stride=stride, padding=padding, groups=groups)

    def depthwise_norm(self, depthwise: rdnet.Convolution, norm: rdnet.LayerNorm, x: Float[Array, "b h w c"]) -> Array:
        """Convolves depthwise and normalizes rows while they are in cache."""
        arrays = [array.astype(x.dtype) for module in (depthwise, norm) for array in module.arrays(x.shape[-1])]
        if not dense_layer.is_usable(x, *arrays) or arrays[0].shape[0] != dense_layer.SIDE:
            kernel, bias = arrays[:2]
            y = convolve_fast(x, kernel, stride=1, padding=depthwise.padding, groups=depthwise.groups)
            return norm(y + bias[None, None, None, :])
        return dense_layer.depthwise_norm(x, *arrays, norm.epsilon)

    def bottleneck(self, conv1: rdnet.Convolution, conv2: rdnet.Convolution, x: Float[Array, "b h w c"]) -> Array:
        """Multiplies a block of pixels by both kernels, with the GELU in between."""
        layers = ((conv1, x.shape[-1]), (conv2, conv1.features))
        arrays = [array.astype(x.dtype) for conv, width in layers for array in conv.arrays(width)]
        if not dense_layer.is_usable(x, *arrays):
            is_for_tpu = (self.platform or jax.default_backend()) == "tpu" and not is_plain()
            return conv2((_gelu_by_erf if is_for_tpu else _gelu)(conv1(x)))
        kernel1, bias1, kernel2, bias2 = arrays
        return dense_layer.bottleneck(x, kernel1[0, 0], bias1, kernel2[0, 0], bias2)


@jax.checkpoint
def _gelu(x: Array) -> Array:
    """Computes the exact GELU, of which the backward pass keeps x alone: computing costs less than reading."""
    return jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def _gelu_by_erf(x: Array) -> Array:
    """Computes the exact GELU by erf, in float32 or wider; the backward pass keeps x alone.

    In the products around it, a TPU's compiler takes three times as long for the erfc of `jax.nn.gelu`.
    """
    z = x.astype(wide(x.dtype))
    return (0.5 * z * (1 + lax.erf(z * 2**-0.5))).astype(x.dtype)


def _gelu_by_erf_backward(x: Array, gradient: Array) -> tuple[Array]:
    z = x.astype(wide(x.dtype))
    slope = 0.5 * (1 + lax.erf(z * 2**-0.5)) + z * jnp.exp(-0.5 * z * z) * (2 * math.pi) ** -0.5
    return ((gradient.astype(z.dtype) * slope).astype(x.dtype),)


_gelu_by_erf.defvjp(lambda x: (_gelu_by_erf(x), x), _gelu_by_erf_backward)


def _split_into_patches(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 c2"]:
    batch, height, width, channels = x.shape
    rows, columns = height // side, width // side
    x = x[:, : rows * side, : columns * side].reshape(batch, rows, side, columns, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, side * side * channels)
