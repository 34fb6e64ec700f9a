"""Readers with a 1x1 kernel by the GPU's kernels: from the front of a block's buffer, without slicing it first."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.kernels.gpu.reader import norm_relu_matmul, norm_relu_matmul_kernel
from densenet_jax.kernels.gpu.reader_gradients import add_gradients, add_gradients_kernel
from densenet_jax.models.layers import Moments
from densenet_jax.models.readers import Reader, ReaderGradients

Kernels = Literal["xla", "pallas", "interpret"]


def read_with_moments(
    maps: Float[Array, "b h w c2"], reader: Reader, groups: int, shift: Float[Array, " o"], kernels: Kernels
) -> tuple[Float[Array, "b h w o"], Moments]:
    """What `readers.read` gives of the first channels, and its moments over groups of examples about shift."""
    rows = maps.shape[0] * maps.shape[1] * maps.shape[2]
    operands = (maps.reshape(rows, -1), reader.scale, reader.bias, reader.kernel[0, 0], shift)
    if kernels == "interpret":
        out, sums, squares = norm_relu_matmul_kernel(*operands, groups=groups, interpret=True)
    else:
        out, sums, squares = norm_relu_matmul(*operands, groups=groups)
    mean, square = sums * (groups / rows), squares * (groups / rows)
    moments = Moments(mean + shift.astype(mean.dtype)[None, :], jnp.maximum(square - jnp.square(mean), 0))
    return out.reshape(*maps.shape[:3], -1), moments


def add_read_gradients(
    total: Float[Array, "b h w c2"],
    maps: Float[Array, "b h w c2"],
    reader: Reader,
    gradient: Float[Array, "b h w o"],
    groups: int,
    kernels: Kernels,
) -> ReaderGradients:
    """`readers.read_gradients` with its inputs those of all readers so far: total, with this one's part added."""
    rows = maps.shape[0] * maps.shape[1] * maps.shape[2]
    flat = (array.reshape(rows, -1) for array in (total, maps))
    operands = (*flat, reader.scale, reader.bias, reader.kernel[0, 0], gradient.reshape(rows, -1))
    if kernels == "interpret":
        added, scale, bias, kernel = add_gradients_kernel(*operands, groups=groups, interpret=True)
    else:
        added, scale, bias, kernel = add_gradients(*operands, groups=groups)
    return ReaderGradients(added.reshape(total.shape), scale, bias, kernel[None, None])
