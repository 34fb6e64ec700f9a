"""The dense layer of an RDNet on a CPU: its two parts and their gradients, in float32.

`depthwise_norm` normalizes rows of a depthwise convolution's output while they are in cache. `bottleneck` multiplies a
block of pixels by both 1x1 kernels with the exact GELU in between, so that the four times wider values in the middle
never go through memory; training keeps the GELU's input, and computes the GELU again with its derivative.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu.convolution import plain_convolve
from densenet_jax.kernels.cpu.primitive import define, have_static_sizes, is_available

SIDE = 7  # of the depthwise kernel


def is_usable(*arrays: Array) -> bool:
    """Whether the kernels are available and support these operands."""
    return is_available() and {array.dtype for array in arrays} == {jnp.dtype("float32")} and have_static_sizes(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def depthwise_norm(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "7 7 1 c"],
    bias: Float[Array, " c"],
    scale: Float[Array, " c"],
    shift: Float[Array, " c"],
    epsilon: float,
) -> Float[Array, "b h w c"]:
    """Convolves depthwise at stride 1 and normalizes over channels, times scale plus shift."""
    return _depthwise_norm_p.bind(x, kernel, bias, scale, shift, epsilon=epsilon)[0]


def _keep_depthwise_norm(x: Array, *parameters: Array) -> Any:
    kernel, bias, scale, shift, epsilon = parameters
    y, d = _depthwise_norm_kept_p.bind(x, kernel, bias, scale, shift, epsilon=epsilon)
    return y, (x, kernel, scale, d)


def _differentiate_depthwise_norm(epsilon: float, kept: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    return tuple(_depthwise_norm_gradient_p.bind(*kept, g, epsilon=epsilon)[:5])


depthwise_norm.defvjp(_keep_depthwise_norm, _differentiate_depthwise_norm)


@jax.custom_vjp
def bottleneck(
    x: Float[Array, "b h w c"],
    kernel1: Float[Array, "c d"],
    bias1: Float[Array, " d"],
    kernel2: Float[Array, "d o"],
    bias2: Float[Array, " o"],
) -> Float[Array, "b h w o"]:
    """Computes GELU(x @ kernel1 + bias1) @ kernel2 + bias2 with the exact GELU."""
    return _bottleneck_p.bind(x, kernel1, bias1, kernel2, bias2)[0]


def _keep_bottleneck(x: Array, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> Any:
    y, z = _bottleneck_kept_p.bind(x, kernel1, bias1, kernel2, bias2)
    return y, (x, z, kernel1, kernel2)


def _differentiate_bottleneck(kept: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    return *_bottleneck_gradient_p.bind(*kept, g)[:4], jnp.sum(g, axis=(0, 1, 2))


bottleneck.defvjp(_keep_bottleneck, _differentiate_bottleneck)


def _normalize(d: Array, scale: Array, shift: Array, epsilon: float) -> Array:
    centered = d - jnp.mean(d, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    scale, shift = (row[None, None, None, :] for row in (scale, shift))
    return centered * lax.rsqrt(var + epsilon) * scale + shift


def _convolve(x: Array, kernel: Array) -> Array:
    return plain_convolve(x, kernel, padding=SIDE // 2, groups=x.shape[-1])


def _plain_depthwise_norm_kept(
    x: Array, kernel: Array, bias: Array, scale: Array, shift: Array, *, epsilon: float
) -> list[Array]:
    d = _convolve(x, kernel) + bias[None, None, None, :]
    return [_normalize(d, scale, shift, epsilon), d]


def plain_depthwise_norm(*operands: Array, epsilon: float) -> list[Array]:
    """Computes `depthwise_norm` in plain JAX, as a list of one."""
    return _plain_depthwise_norm_kept(*operands, epsilon=epsilon)[:1]


def _plain_depthwise_norm_gradient(
    x: Array, kernel: Array, scale: Array, d: Array, g: Array, *, epsilon: float
) -> list[Array]:
    _, pull_norm = jax.vjp(functools.partial(_normalize, epsilon=epsilon), d, scale, jnp.zeros_like(scale))
    grad_d, grad_scale, grad_shift = pull_norm(g)
    _, pull_convolution = jax.vjp(_convolve, x, kernel)
    return [*pull_convolution(grad_d), jnp.sum(grad_d, axis=(0, 1, 2)), grad_scale, grad_shift, grad_d]


def _gelu(z: Array) -> Array:
    return jax.nn.gelu(z, approximate=False)


def _plain_bottleneck_kept(x: Array, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> list[Array]:
    z = x @ kernel1 + bias1[None, None, None, :]
    return [_gelu(z) @ kernel2 + bias2[None, None, None, :], z]


def plain_bottleneck(*operands: Array) -> list[Array]:
    """Computes `bottleneck` in plain JAX, as a list of one."""
    return _plain_bottleneck_kept(*operands)[:1]


def _plain_bottleneck_gradient(x: Array, z: Array, kernel1: Array, kernel2: Array, g: Array) -> list[Array]:
    bottleneck, pullback = jax.vjp(_gelu, z)
    (grad_z,) = pullback(g @ kernel2.T)
    grad_kernel1, grad_kernel2 = (jnp.einsum("bhwi,bhwo->io", *pair) for pair in ((x, grad_z), (bottleneck, g)))
    return [grad_z @ kernel1.T, grad_kernel1, jnp.sum(grad_z, axis=(0, 1, 2)), grad_kernel2, grad_z, bottleneck]


_define = functools.partial(define, multiple_results=True)
_depthwise_norm_p = _define("depthwise_norm", plain_depthwise_norm, shapes=lambda x, *_, epsilon: [x.shape])
_depthwise_norm_kept_p = _define(
    "depthwise_norm_kept", _plain_depthwise_norm_kept, shapes=lambda x, *_, epsilon: [x.shape, x.shape]
)
_depthwise_norm_gradient_p = _define(
    "depthwise_norm_gradient",
    _plain_depthwise_norm_gradient,
    shapes=lambda x, kernel, scale, *_, epsilon: [x.shape, kernel.shape, *[scale.shape] * 3, x.shape],
)
_bottleneck_p = _define(
    "bottleneck", plain_bottleneck, shapes=lambda x, *parameters: [(*x.shape[:-1], *parameters[-1].shape)]
)
_bottleneck_kept_p = _define(
    "bottleneck_kept",
    _plain_bottleneck_kept,
    shapes=lambda x, _, bias1, __, bias2: [(*x.shape[:-1], *bias2.shape), (*x.shape[:-1], *bias1.shape)],
)
_bottleneck_gradient_p = _define(
    "bottleneck_gradient",
    _plain_bottleneck_gradient,
    shapes=lambda x, z, kernel1, kernel2, _: [
        x.shape,
        kernel1.shape,
        kernel1.shape[1:],
        kernel2.shape,
        z.shape,
        z.shape,
    ],
)
