"""Readers with a 1x1 kernel by the GPU's kernels: from the front of a block's buffer, without slicing it first.

Over a mesh each device reads its own examples, and what is summed over the batch is added up over the devices.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.kernels.gpu.reader import norm_relu_matmul, norm_relu_matmul_kernel
from densenet_jax.kernels.gpu.reader_gradients import add_gradients, add_gradients_kernel
from densenet_jax.kernels.shard import on_each_device
from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.layers import Moments
from densenet_jax.models.readers import Reader, ReaderGradients


def read_with_moments(
    maps: Float[Array, "b h w c2"], reader: Reader, groups: int, shift: Float[Array, " o"], arithmetic: Arithmetic
) -> tuple[Float[Array, "b h w o"], Moments]:
    """What `readers.read` gives of the first channels, and its moments over groups of examples about shift."""
    rows = maps.shape[0] * maps.shape[1] * maps.shape[2]
    multiply = norm_relu_matmul
    if arithmetic.kernels == "interpret":
        multiply = functools.partial(norm_relu_matmul_kernel, interpret=True)
    out, sums, squares = on_each_device(
        multiply, arithmetic.mesh, groups, by_example=(True, *[False] * 4), results=("example", "group", "group")
    )(maps.reshape(rows, -1), reader.scale, reader.bias, reader.kernel[0, 0], shift)
    mean, square = sums * (groups / rows), squares * (groups / rows)
    moments = Moments(mean + shift.astype(mean.dtype)[None, :], jnp.maximum(square - jnp.square(mean), 0))
    return out.reshape(*maps.shape[:3], -1), moments


def add_read_gradients(
    total: Float[Array, "b h w c2"],
    maps: Float[Array, "b h w c2"],
    reader: Reader,
    gradient: Float[Array, "b h w o"],
    groups: int,
    arithmetic: Arithmetic,
) -> ReaderGradients:
    """`readers.read_gradients` with its inputs those of all readers so far: total, with this one's part added."""
    rows = maps.shape[0] * maps.shape[1] * maps.shape[2]
    flat = [array.reshape(rows, -1) for array in (total, maps, gradient)]
    add = add_gradients
    if arithmetic.kernels == "interpret":
        add = functools.partial(add_gradients_kernel, interpret=True)
    added, scale, bias, kernel = on_each_device(
        add,
        arithmetic.mesh,
        groups,
        by_example=(True, True, False, False, False, True),
        results=("example", "group", "group", "whole"),
    )(*flat[:2], reader.scale, reader.bias, reader.kernel[0, 0], flat[2])
    return ReaderGradients(added.reshape(total.shape), scale, bias, kernel[None, None])
