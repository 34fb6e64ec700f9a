"""Blocks in evaluation on a CPU: one call of the compiled kernels computes a whole dense block or stage."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType
from densenet_jax.kernels.cpu import block as cpu
from densenet_jax.kernels.cpu.convolution import convolve_fast
from densenet_jax.models.densenet import BlockOptions, DenseLayer
from densenet_jax.models.dual_path import DualPathBlock
from densenet_jax.models.layers import BatchNorm


class _Plan(NamedTuple):
    """Static arguments of `kernels.cpu.block.run_block`."""

    steps: tuple[cpu.Step, ...]
    shapes: tuple[tuple[int, ...], ...]
    epsilon: float
    copied: int = 0


def evaluate_dense_block(
    layers: Sequence[DenseLayer], x: Float[Array, "b h w c"], options: BlockOptions, *, is_packed: bool
) -> Float[Array, "b h w c2"] | None:
    """Computes `densenet.Plain.dense_block` in evaluation; None where the kernels don't support the operands."""
    x, steps, arrays = x.astype(options.dtype), list[cpu.Step](), list[cpu.Arrays]()
    width, bottleneck = x.shape[-1], 0
    for layer in layers:
        first, second = (layer.conv1.kernel, layer.conv2.kernel) if layer.bottleneck_width else (None, layer.conv1.kernel)
        if first is not None:
            bottleneck = first.shape[-1]
            steps.append(cpu.Step(1, 2, packed=is_packed and cpu.is_packable(first)))
            arrays.append(_arrays(layer.norm1, first, options.dtype))
        packed = is_packed and cpu.is_packable(second)
        steps.append(cpu.Step(1 if first is None else 2, 1, offset=width, packed=packed))
        arrays.append(_arrays(layer.norm1 if first is None else layer.norm2, second, options.dtype))
        width += second.shape[-1]
    shapes = [(*x.shape[:3], width), (*x.shape[:3], bottleneck)][: 2 if bottleneck else 1]
    return _run(_Plan(tuple(steps), tuple(shapes), options.norm.epsilon, x.shape[-1]), x, arrays)


def evaluate_stage(
    blocks: Sequence[DualPathBlock], x: Float[Array, "b h w c"], *, is_packed: bool
) -> Float[Array, "b h2 w2 c2"] | None:
    """Computes `dual_path.Plain.stage` in evaluation; None where the kernels don't support the operands."""
    steps, arrays, (first, dtype) = list[cpu.Step](), list[cpu.Arrays](), (blocks[0], blocks[0].dtype)
    residual, new, stride, x = first.residual_width, first.dense_increment, first.stride, x.astype(dtype)
    projection = first.projection()
    if projection is None:
        return None

    def add(norm: BatchNorm, kernel: Array, *places: int, groups: int = 1, stride: int = 1) -> None:
        packed = is_packed and cpu.is_packable(kernel, groups)
        steps.append(cpu.Step(*places, stride=stride, groups=groups, packed=packed))
        arrays.append(_arrays(norm, kernel, dtype))

    add(projection.bn, projection.conv.kernel, 0, 1, stride=stride)
    width = projection.conv.kernel.shape[-1]
    for index, block in enumerate(blocks):
        inner = 4 if index else 2
        add(block.c1x1_a.bn, block.c1x1_a.conv.kernel, 1 if index else 0, inner)
        own = {"groups": block.groups, "stride": block.stride}
        add(block.c3x3_b.bn, block.c3x3_b.conv.kernel, inner, 3, **own)
        if block.split_projection:
            add(block.c1x1_c.bn, block.c1x1_c1.kernel, 3, 1, residual, residual)
            add(block.c1x1_c.bn, block.c1x1_c2.kernel, 3, 1, width)
        else:
            add(block.c1x1_c.bn, block.c1x1_c.conv.kernel, 3, 1, width, residual)
        width += new
    batch, *sides = x.shape[:3]
    after = [(side - 1) // stride + 1 for side in sides]
    shapes = ((batch, *after, width), (batch, *sides, first.width), (batch, *after, first.width))
    return _run(_Plan(tuple(steps), (*shapes, shapes[-1]), first.norm_options.epsilon), x, arrays)


def _arrays(norm: BatchNorm, kernel: Array, dtype: DType) -> cpu.Arrays:
    empty = jnp.zeros((0,), dtype)
    if norm.options.folded:
        own = (empty if norm.after_convolution else norm.scale, norm.bias, empty, empty, kernel)
    else:
        own = (norm.scale, norm.bias, norm.mean.value, norm.var.value, kernel)
    return cpu.Arrays(*(array.astype(dtype) for array in own))


def _run(plan: _Plan, x: Array, arrays: Sequence[cpu.Arrays]) -> Array | None:
    return _evaluate(plan, x, tuple(arrays)) if cpu.is_usable(x, arrays) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _evaluate(plan: _Plan, x: Array, arrays: tuple[cpu.Arrays, ...]) -> Array:
    return cpu.run_block(x, arrays, **plan._asdict())


def _forward(plan: _Plan, x: Array, arrays: tuple[cpu.Arrays, ...]) -> tuple[Array, jax.tree_util.Partial]:
    def run(x: Array, arrays: tuple[cpu.Arrays, ...]) -> Array:
        operands = [array for own in arrays for array in own]
        return cpu.plain_run_block(x, *operands, convolve=convolve_fast, **plan._asdict())[0]

    return jax.vjp(run, x, arrays)


def _backward(plan: _Plan, pullback: jax.tree_util.Partial, gradient: Array) -> tuple[Array, ...]:
    del plan
    return pullback(gradient)


_evaluate.defvjp(_forward, _backward)
