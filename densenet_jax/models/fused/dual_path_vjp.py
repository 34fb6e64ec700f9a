"""A stage of dual-path blocks that normalizes each feature map once: its forward pass and its own derivative.

A block reads the residual path and the dense path together. The residual path is another sum in every block, which one
convolution reads: that normalizes it. The dense path only grows: what a block adds to it is normalized once for all
blocks after it and for what reads the stage. Kept for the backward pass are every residual sum, x_hat of the dense path
and the outputs of each block's first two convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from densenet_jax.models.fused.backend import Buffer
from densenet_jax.models.fused.dual_path_arrays import Block, Config, Outputs, PerMap, Residuals
from densenet_jax.models.fused.norm import Normalization, Sums, concatenate_stats, make_normalization, select_channels
from densenet_jax.models.fused.norm_relu_conv import (
    NormReluConv,
    Operands,
    Window,
    sum_gradient,
    sums_from_gradients,
)
from densenet_jax.models.fused.split import Part, SplitConv, split_conv, split_conv_grads
from densenet_jax.models.layers import BatchStats


def _block_inputs(config: Config, inputs: Array, residual: Part | None, dense: Buffer, width: int) -> tuple[Part, ...]:
    """Returns a block's inputs: the stage's, or the residual sum before it and the dense path so far."""
    if residual is None:
        return (Part(inputs),)
    if isinstance(dense, tuple):
        return (Part(jnp.concatenate([residual.x_hat(), config.backend.channels(dense, 0, width)], axis=-1)),)
    return residual, Part(config.backend.readable(dense, width))


def _body_forward(
    config: Config, parts: tuple[Part, ...], block: Block, window: Window, shifts: tuple[Array | None, Array | None]
) -> tuple[Array, Array, Normalization, Normalization]:
    """Returns the outputs of a block's first two convolutions, and the norms that read them."""
    options, backend = config.norm, config.backend
    ((second, stats),) = split_conv(parts, block.first, shifts[:1], options, backend)
    second_norm = make_normalization(second, options, shifts[0], stats)
    operands = Operands(second, block.second, second_norm, window)
    third, stats = backend.norm_relu_conv_with_stats(operands, shifts[1], options)
    return second, third, second_norm, make_normalization(third, options, shifts[1], stats)


def _forward(config: Config, inputs: Array, blocks: tuple[Block, ...], shifts: PerMap) -> tuple[Outputs, Residuals]:
    options, backend = config.norm, config.backend
    ends, width = config.dense_ends(blocks), config.residual_width
    bottlenecks: list[tuple[Array, Array]] = []
    residuals: list[Part] = []
    stats: list[tuple[BatchStats, ...]] = []
    dense: Buffer = None
    total: Array | None = None
    for index, block in enumerate(blocks):
        second_shift, third_shift, residual_shift, dense_shift = (kind[index] for kind in shifts)
        parts = _block_inputs(config, inputs, residuals[-1] if index else None, dense, ends[index - 1])
        body = _body_forward(config, parts, block, config.window(index), (second_shift, third_shift))
        second, third, second_norm, third_norm = body
        bottlenecks.append((second, third))
        shortcut = None
        if block.projection is not None:
            shortcut = backend.norm_relu_conv(Operands(inputs, block.projection, window=Window(config.stride)))
            total = shortcut[..., :width]
        own_shifts = (residual_shift, dense_shift if shortcut is None else None)  # the shortcut joins the dense path
        outputs = split_conv((Part(third, third_norm),), config.third(block), own_shifts, options, backend, total)
        (total, total_stats), (new, new_stats) = outputs
        if shortcut is not None:
            new = jnp.concatenate([shortcut[..., width:], new], axis=-1)
        residual_norm = make_normalization(total, options, residual_shift, total_stats)
        dense_norm = make_normalization(new, options, dense_shift, new_stats)
        residuals.append(Part(total, residual_norm))
        x_hat = dense_norm.apply(new)
        dense = backend.append(dense, x_hat, ends[index - 1]) if index else backend.new_buffer(x_hat, ends[-1])
        stats.append(tuple(norm.stats for norm in (second_norm, third_norm, residual_norm, dense_norm)))
    all_stats = PerMap(*zip(*stats, strict=True))
    values = jnp.concatenate([residuals[-1].x_hat(), backend.channels(dense, 0, ends[-1])], axis=-1)
    joined = concatenate_stats([all_stats.residual[-1], *all_stats.dense])
    kept = None if config.remat else tuple(bottlenecks)
    return Outputs(values, joined, all_stats), Residuals(
        inputs, tuple(part.x for part in residuals), dense, kept, all_stats, blocks, shifts
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def stage(config: Config, inputs: Array, blocks: tuple[Block, ...], shifts: PerMap) -> Outputs:
    """Computes both paths after the blocks, from x_hat of the first block's input.

    Only the outputs' values and their statistics have a derivative.
    """
    return _forward(config, inputs, blocks, shifts)[0]


class _Carry(NamedTuple):
    """Gradients so far: of the residual sum, and of x_hat of the dense path with its sums."""

    residual: Array
    dense: Array
    dense_sums: Sums


def _bottlenecks(config: Config, saved: Residuals, index: int, parts: Sequence[Part]) -> tuple[Array, Array]:
    """Returns the inputs of a block's second and third convolution, before their norms."""
    if saved.bottlenecks is not None:
        return saved.bottlenecks[index]
    block, backend = saved.blocks[index], config.backend
    ((second, _),) = split_conv(parts, block.first, (None,), config.norm, backend)
    operands = Operands(second, block.second, saved.second_norm(config, index), config.window(index))
    return second, backend.norm_relu_conv(operands)


def _body_backward(
    config: Config, saved: Residuals, index: int, parts: Sequence[Part], gradients: tuple[Array, Array]
) -> tuple[Array, NormReluConv, SplitConv]:
    """Backpropagates from a block's part of the two paths to the output of its first convolution."""
    block, backend = saved.blocks[index], config.backend
    second_norm = saved.second_norm(config, index)
    third_norm = saved.third_norm(config, index)
    second, third = _bottlenecks(config, saved, index, parts)
    groups = third_norm.stats.mean.shape[0]
    outer = split_conv_grads((Part(third, third_norm),), config.third(block), gradients, groups, backend)
    sums = sums_from_gradients(block.third.scale, outer.scale, outer.bias)
    gradient = third_norm.gradient(outer.x[0], third_norm.apply(third), sums, backend.compute)
    groups = second_norm.stats.mean.shape[0]
    operands = Operands(second, block.second, second_norm, config.window(index))
    inner = backend.norm_relu_conv_grads(operands, gradient, groups)
    sums = sums_from_gradients(block.second.scale, inner.scale, inner.bias)
    gradient = second_norm.gradient(inner.x, second_norm.apply(second), sums, backend.compute)
    of_third = outer.of_parameters()
    if len(block.third.kernels) == 1:
        of_third = of_third._replace(kernels=(jnp.concatenate(of_third.kernels, axis=-1),))
    return gradient, inner.of_parameters(block.second), of_third


def _first_backward(
    config: Config, saved: Residuals, index: int, end: int, gradient: Array, carry: _Carry
) -> tuple[_Carry, SplitConv]:
    """Backpropagates from the output of a later block's first convolution to the paths before it."""
    conv = saved.blocks[index].first
    norm, width = saved.residual_norm(config, index - 1), config.residual_width
    residual = Part(saved.residual[index - 1], norm)
    parts = _block_inputs(config, saved.inputs, residual, saved.dense, end)
    total = carry.dense if config.backend.in_place and len(parts) > 1 else None
    groups = norm.stats.mean.shape[0]
    grads = split_conv_grads(parts, conv, (gradient,), groups, config.backend, totals=(None, total))
    sums = sums_from_gradients(conv.scale, grads.scale, grads.bias)
    own = select_channels(sums, 0, width)
    grad_residual = norm.gradient(grads.x[0][..., :width], residual.x_hat(), own, config.backend.compute)
    if total is not None:
        dense = grads.x[1]
    else:
        grad_dense = grads.x[1] if len(parts) > 1 else grads.x[0][..., width:]
        dense = (carry.dense[..., :end].astype(grad_dense.dtype) + grad_dense).astype(carry.dense.dtype)
    dense_sums = (carry.dense_sums[0][:, :end] + sums[0][:, width:], carry.dense_sums[1][:, :end] + sums[1][:, width:])
    return _Carry(carry.residual + grad_residual, dense, dense_sums), grads.of_parameters()


def _entry_backward(
    config: Config, saved: Residuals, gradient: Array, shortcut: Array
) -> tuple[Array, SplitConv, NormReluConv | None]:
    """Backpropagates from the first block's first convolution and shortcut to the stage's input."""
    block, inputs, backend = saved.blocks[0], saved.inputs, config.backend
    assert block.projection is not None
    grads = split_conv_grads((Part(inputs),), block.first, (gradient,), 1, backend)
    operands = Operands(inputs, block.projection, window=Window(config.stride))
    other = backend.norm_relu_conv_grads(operands, shortcut, 1)
    projection = other.of_parameters(block.projection)
    return (grads.x[0] + other.x).astype(inputs.dtype), grads.of_parameters(), projection


def _start_backward(config: Config, saved: Residuals, cotangents: Outputs) -> _Carry:
    """Splits the gradient of the stage's x_hat into the last residual sum's and the dense path's."""
    width = config.residual_width
    residual, dense = cotangents.values[..., :width], cotangents.values[..., width:]
    norm = saved.residual_norm(config, -1, select_channels(cotangents.stats, 0, width))
    x_hat, groups = norm.apply(saved.residual[-1]), norm.stats.mean.shape[0]
    residual = norm.gradient(residual, x_hat, sum_gradient(residual, x_hat, groups))
    x_hat = config.backend.channels(saved.dense, 0, dense.shape[-1])
    return _Carry(residual, dense, sum_gradient(dense, x_hat, groups))


def _backward(config: Config, saved: Residuals, cotangents: Outputs) -> tuple[Any, ...]:
    ends, width = config.dense_ends(saved.blocks), config.residual_width
    carry = _start_backward(config, saved, cotangents)
    blocks: list[Block] = []
    inputs = None
    for index in reversed(range(len(saved.blocks))):
        start, end = ends[index - 1] if index else 0, ends[index]
        grad_stats = select_channels(cotangents.stats, width + start, width + end)
        norm = config.normalization(saved.stats.dense[index], saved.shifts.dense[index], grad_stats)
        new = norm.gradient(
            carry.dense[..., start:end],
            config.backend.channels(saved.dense, start, end),
            select_channels(carry.dense_sums, start, end),
            config.backend.compute,
        )
        projection = saved.blocks[index].projection
        own = (
            0 if projection is None else projection.kernel.shape[-1] - width
        )  # the block's own come after the shortcut's
        before = Part(saved.residual[index - 1], saved.residual_norm(config, index - 1)) if index else None
        parts = _block_inputs(config, saved.inputs, before, saved.dense, start)
        gradient, second, third = _body_backward(config, saved, index, parts, (carry.residual, new[..., own:]))
        if index:
            carry, first = _first_backward(config, saved, index, start, gradient, carry)
        else:
            shortcut = jnp.concatenate([carry.residual, new[..., :own]], axis=-1)
            inputs, first, projection = _entry_backward(config, saved, gradient, shortcut)
        blocks.append(Block(first, second, third, projection))
    gradients = jax.tree.map(lambda a, like: a.astype(like.dtype), tuple(reversed(blocks)), saved.blocks)
    return inputs, gradients, None


stage.defvjp(_forward, _backward)
