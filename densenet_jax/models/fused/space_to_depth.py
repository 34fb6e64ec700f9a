"""Rewrites a padded stride-2 convolution as an equivalent unpadded stride-1 one of four times the channels.

A GPU's matrix units take channels by eights: three of an image are padded with five zeros. Four pixels have twelve, of
sixteen.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

_CHANNELS = 8  # matrix units take multiples of it


def space_to_depth(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"]
) -> tuple[Float[Array, "b h2 w2 c2"], Float[Array, "k2 k2 c2 o"]]:
    """Rewrites x, convolved by an odd kernel at stride 2 and padded by half of it, as an unpadded convolution."""
    size, (height, width), channels = kernel.shape[0], x.shape[1:3], x.shape[3]
    blocks = (size + 1) // 2
    sides = [2 * ((side + 1) // 2 + blocks - 1) for side in (height, width)]
    before = size // 2
    padding = [(before, padded - side - before) for side, padded in zip((height, width), sides, strict=True)]
    spare = -4 * channels % _CHANNELS
    x = _pixels_to_channels(jnp.pad(x, ((0, 0), *padding, (0, 0))), spare)
    return x, _kernel_to_channels(kernel, spare)


def _pixels_to_channels(x: Array, spare: int) -> Float[Array, "b h2 w2 c4"]:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return jnp.pad(x.reshape(batch, height // 2, width // 2, 4 * channels), ((0, 0), (0, 0), (0, 0), (0, spare)))


def _kernel_to_channels(kernel: Array, spare: int) -> Float[Array, "k2 k2 c4 o"]:
    size, _, channels, outputs = kernel.shape
    half = (size + 1) // 2
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = kernel.reshape(half, 2, half, 2, channels, outputs).transpose(0, 2, 1, 3, 4, 5)
    return jnp.pad(kernel.reshape(half, half, 4 * channels, outputs), ((0, 0), (0, 0), (0, spare), (0, 0)))
