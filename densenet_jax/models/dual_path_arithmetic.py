"""The arithmetic of a dual-path stage that normalizes each map once, and its derivative.

A block reads the residual path and the dense path together. The residual path is another sum in every block: it is
normalized once for its readers. The dense path only grows: what a block adds to it is normalized once for all blocks
after it and for what reads the stage. Kept for the backward pass are x^ of every residual sum, x^ of the dense path
and the outputs of each block's first two convolutions; what was rectified is recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.dual_path_stage import StageOptions
from densenet_jax.models.layers import Moments
from densenet_jax.models.normalization import Normalization, norm_of
from densenet_jax.models.readers import (
    Reader,
    Window,
    read,
    read_gradients,
    read_with_moments,
    sums_by_reader,
    sums_of_gradient,
)
from densenet_jax.models.split_readers import (
    Into,
    MultiGradients,
    MultiReader,
    read_parts,
    read_parts_gradients,
)

Sums = tuple[Array, Array]


class Block(NamedTuple):
    """The differentiated arrays of one block."""

    first: MultiReader
    second: Reader
    third: MultiReader
    projection: Reader | None


class Maps(NamedTuple):
    """Something for each map that a block makes: float[c] near its mean (a shift; None: frozen norms), or its moments.

    Attributes:
      second, third: what those convolutions read, before their norms.
      residual: the residual sum after the block.
      dense: what the block adds to the dense path; in the first block the shortcut's channels are among them.
    """

    second: tuple[Any, ...]
    third: tuple[Any, ...]
    residual: tuple[Any, ...]
    dense: tuple[Any, ...]


class Facts(NamedTuple):
    """What is static in a stage's arithmetic: the stage's options, and how it is computed."""

    options: StageOptions
    arithmetic: Arithmetic


class Outputs(NamedTuple):
    """x^ of both paths joined, float[b, h, w, c], with its moments; and all moments, which have no derivative."""

    values: Array
    moments: Moments
    seen: Maps


class Residuals(NamedTuple):
    """What the backward pass needs; second and third, outputs of convolutions, are None under remat.

    Where a shift is None, norms are frozen, whose running statistics are folded into scale and bias: x^ is the map.
    """

    inputs: Array
    residual: tuple[Array, ...]
    dense: Any
    second: tuple[Array | None, ...]
    third: tuple[Array | None, ...]
    seen: Maps
    blocks: tuple[Block, ...]
    shifts: Maps


def _put(dense: Any, new: Array, start: int, width: int, arithmetic: Arithmetic) -> Any:
    """The dense path with a block's channels, in one buffer of width or as one array a block."""
    if arithmetic.storage == "arrays":
        return (*(dense or ()), new)
    if dense is None:
        return jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, width - new.shape[-1])))
    return lax.dynamic_update_slice_in_dim(dense, new, start, axis=3)


def _columns(dense: Any, start: int, end: int) -> Array:
    """Channels of the dense path that whole blocks added."""
    if not isinstance(dense, tuple):
        return dense[..., start:end]
    ends = np.cumsum([piece.shape[-1] for piece in dense])
    first, last = (int(np.searchsorted(ends, edge, "right")) for edge in (start, end - 1))
    return jnp.concatenate(dense[first : last + 1], axis=-1)


def _dense_ends(blocks: Sequence[Block]) -> list[int]:
    """The dense path's width after each block."""
    new = [block.third.kernels[1].shape[-1] for block in blocks]
    if blocks[0].projection is not None:
        new[0] += blocks[0].projection.kernel.shape[-1] - blocks[0].third.kernels[0].shape[-1]
    return [int(end) for end in np.cumsum(new)]


def _parts(facts: Facts, inputs: Array, residual: Array | None, dense: Any, width: int) -> tuple[Array, ...]:
    """What a block reads: the stage's input, or the residual sum before it and the dense path so far."""
    if residual is None:
        return (inputs,)
    if isinstance(dense, tuple):
        return (jnp.concatenate([residual, _columns(dense, 0, width)], axis=-1),)
    return residual, dense if facts.arithmetic.library else dense[..., :width]


def joined(moments: Sequence[Moments]) -> Moments:
    """The moments of joined channels."""
    return Moments(*(jnp.concatenate(kind, axis=-1) for kind in zip(*moments, strict=True)))


def _window(facts: Facts, index: int) -> Window:
    """Of a block's second convolution; the first block's has the stage's stride."""
    return Window(1 if index else facts.options.stride, facts.options.groups)


class _Body(NamedTuple):
    """What the first two convolutions of a block give, and how the next ones' norms make x^ of that."""

    second: Array
    third: Array
    of_second: Normalization
    of_third: Normalization


def _body_forward(
    facts: Facts, parts: tuple[Array, ...], block: Block, window: Window, shifts: tuple[Array | None, Array | None]
) -> _Body:
    options, arithmetic = facts.options, facts.arithmetic
    ((second, moments),) = read_parts(parts, block.first, (Into(shift=shifts[0]),), options.norm, arithmetic)
    of_second = norm_of(second, options.norm, shifts[0], moments)
    third, moments = read_with_moments(
        second, block.second, shifts[1], options.norm, arithmetic, of_second, window=window
    )
    return _Body(second, third, of_second, norm_of(third, options.norm, shifts[1], moments))


def _forward(facts: Facts, inputs: Array, blocks: tuple[Block, ...], shifts: Maps) -> tuple[Outputs, Residuals]:
    options, arithmetic = facts.options, facts.arithmetic
    ends = _dense_ends(blocks)
    bodies: list[_Body] = []
    residuals: list[Array] = []
    seen: list[tuple[Moments, ...]] = []
    dense: Any = None
    total: Array | None = None
    for index, block in enumerate(blocks):
        of_second, of_third, of_residual, of_dense = (kind[index] for kind in shifts)
        parts = _parts(facts, inputs, residuals[-1] if index else None, dense, ends[index - 1])
        body = _body_forward(facts, parts, block, _window(facts, index), (of_second, of_third))
        bodies.append(body)
        shortcut = None
        if block.projection is not None:
            shortcut = read(inputs, block.projection, arithmetic, window=Window(options.stride))
            total = shortcut[..., : block.third.kernels[0].shape[-1]]
        into = (Into(total, of_residual), Into(shift=of_dense if shortcut is None else None))
        found = read_parts((body.third,), block.third, into, options.norm, arithmetic, body.of_third)
        (total, of_total), (new, of_new) = found
        if shortcut is not None:
            new = jnp.concatenate([shortcut[..., total.shape[-1] :], new], axis=-1)
        norms = norm_of(total, options.norm, of_residual, of_total), norm_of(new, options.norm, of_dense, of_new)
        residuals.append(norms[0].apply(total))
        dense = _put(dense, norms[1].apply(new), ends[index] - new.shape[-1], ends[-1], arithmetic)
        seen.append(tuple(norm.moments for norm in (body.of_second, body.of_third, *norms)))
    moments = Maps(*zip(*seen, strict=True))
    values = jnp.concatenate([residuals[-1], _columns(dense, 0, ends[-1])], axis=-1)
    outputs = Outputs(values, joined([moments.residual[-1], *moments.dense]), moments)
    second = tuple(None if options.remat else body.second for body in bodies)
    third = tuple(None if options.remat else body.third for body in bodies)
    return outputs, Residuals(inputs, tuple(residuals), dense, second, third, moments, blocks, shifts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def stage(facts: Facts, inputs: Array, blocks: tuple[Block, ...], shifts: Maps) -> Outputs:
    """Both paths after the blocks, of x^ of what the first reads; only values and their moments have a derivative."""
    return _forward(facts, inputs, blocks, shifts)[0]


class _Open(NamedTuple):
    """What has come back so far: the gradient of the residual sum, and of x^ of the dense path with its sums."""

    residual: Array
    dense: Array
    dense_sums: Sums


def _norm(facts: Facts, moments: Moments, shift: Array | None, of_moments: Moments | None = None) -> Normalization:
    """How a map became x^."""
    return Normalization(moments, None if shift is None else facts.options.norm.epsilon, of_moments)


def _hidden(facts: Facts, saved: Residuals, index: int, parts: Sequence[Array]) -> tuple[Array, Array]:
    """What the second and the third convolution of a block read, before their norms."""
    options, block, arithmetic = facts.options, saved.blocks[index], facts.arithmetic
    second, third = saved.second[index], saved.third[index]
    if second is None:
        ((second, _),) = read_parts(parts, block.first, (Into(),), options.norm, arithmetic)
    if third is None:
        norm = _norm_of_second(facts, saved, index)
        third = read(second, block.second, arithmetic, norm, _window(facts, index))
    return second, third


def _norm_of_second(facts: Facts, saved: Residuals, index: int) -> Normalization:
    return _norm(facts, saved.seen.second[index], saved.shifts.second[index])


def _summed(found: MultiGradients) -> MultiReader:
    """The parameters' gradients, of all groups."""
    return MultiReader(found.scale.sum(axis=0), found.bias.sum(axis=0), found.kernels)


def _body_backward(
    facts: Facts, saved: Residuals, index: int, parts: Sequence[Array], gradients: tuple[Array, Array]
) -> tuple[Array, Reader, MultiReader]:
    """From what a block adds to the two paths to the output of its first convolution."""
    block, arithmetic = saved.blocks[index], facts.arithmetic
    of_second = _norm_of_second(facts, saved, index)
    of_third = _norm(facts, saved.seen.third[index], saved.shifts.third[index])
    second, third = _hidden(facts, saved, index, parts)
    groups = of_third.moments.mean.shape[0]
    found = read_parts_gradients((third,), block.third, gradients, groups, arithmetic, of_third)
    sums = sums_by_reader(block.third.scale, found.scale, found.bias)
    raw = of_third.gradient(found.inputs[0], of_third.apply(third), sums)
    groups, window = of_second.moments.mean.shape[0], _window(facts, index)
    grouped = read_gradients(second, block.second, raw, groups, arithmetic, of_second, window)
    sums = sums_by_reader(block.second.scale, grouped.scale, grouped.bias)
    raw = of_second.gradient(grouped.inputs, of_second.apply(second), sums)
    own = Reader(grouped.scale.sum(axis=0), grouped.bias.sum(axis=0), grouped.kernel)
    return raw, own, _summed(found)


def _first_backward(
    facts: Facts, saved: Residuals, index: int, end: int, gradient: Array, back: _Open
) -> tuple[_Open, MultiReader]:
    """From the output of a later block's first convolution to the two paths before the block."""
    reader = saved.blocks[index].first
    normalized, moments = saved.residual[index - 1], saved.seen.residual[index - 1]
    width = normalized.shape[-1]
    parts = _parts(facts, saved.inputs, normalized, saved.dense, end)
    total = back.dense if facts.arithmetic.library and len(parts) > 1 else None
    groups = moments.mean.shape[0]
    found = read_parts_gradients(parts, reader, (gradient,), groups, facts.arithmetic, totals=(None, total))
    sums = sums_by_reader(reader.scale, found.scale, found.bias)
    own = (sums[0][:, :width], sums[1][:, :width])
    of_residual = found.inputs[0][..., :width]
    raw = _norm(facts, moments, saved.shifts.residual[index - 1]).gradient(of_residual, normalized, own)
    if total is not None:
        dense = found.inputs[1]
    else:
        of_dense = found.inputs[1] if len(parts) > 1 else found.inputs[0][..., width:]
        dense = (back.dense[..., :end].astype(of_dense.dtype) + of_dense).astype(back.dense.dtype)
    added = (back.dense_sums[0][:, :end] + sums[0][:, width:], back.dense_sums[1][:, :end] + sums[1][:, width:])
    return _Open(back.residual + raw, dense, added), _summed(found)


def _entry_backward(
    facts: Facts, saved: Residuals, gradient: Array, shortcut: Array
) -> tuple[Array, MultiReader, Reader | None]:
    """From the outputs of the first block's first convolution and of its shortcut to the stage's input."""
    block, inputs = saved.blocks[0], saved.inputs
    assert block.projection is not None
    found = read_parts_gradients((inputs,), block.first, (gradient,), 1, facts.arithmetic)
    window = Window(facts.options.stride)
    other = read_gradients(inputs, block.projection, shortcut, 1, facts.arithmetic, window=window)
    projection = Reader(other.scale.sum(axis=0), other.bias.sum(axis=0), other.kernel)
    return (found.inputs[0] + other.inputs).astype(inputs.dtype), _summed(found), projection


def _open(facts: Facts, saved: Residuals, cotangents: Outputs) -> _Open:
    """What the gradient of the stage's x^ is of the last residual sum and of the dense path."""
    width, moments = saved.residual[-1].shape[-1], saved.seen.residual[-1]
    groups = moments.mean.shape[0]
    residual, dense = cotangents.values[..., :width], cotangents.values[..., width:]
    of_moments = Moments(*(kind[:, :width] for kind in cotangents.moments))
    sums = sums_of_gradient(residual, saved.residual[-1], groups)
    norm = _norm(facts, moments, saved.shifts.residual[-1], of_moments)
    raw = norm.gradient(residual, saved.residual[-1], sums)
    return _Open(raw, dense, sums_of_gradient(dense, _columns(saved.dense, 0, dense.shape[-1]), groups))


def _backward(facts: Facts, saved: Residuals, cotangents: Outputs) -> tuple[Any, ...]:
    ends, width = _dense_ends(saved.blocks), saved.residual[-1].shape[-1]
    back = _open(facts, saved, cotangents)
    found: list[Block] = []
    inputs = None
    for index in reversed(range(len(saved.blocks))):
        start, end = ends[index - 1] if index else 0, ends[index]
        of_moments = Moments(*(kind[:, width + start : width + end] for kind in cotangents.moments))
        new = _norm(facts, saved.seen.dense[index], saved.shifts.dense[index], of_moments).gradient(
            back.dense[..., start:end],
            _columns(saved.dense, start, end),
            (back.dense_sums[0][:, start:end], back.dense_sums[1][:, start:end]),
        )
        own = new.shape[-1] - saved.blocks[index].third.kernels[1].shape[-1]  # before it stand the shortcut's
        parts = _parts(facts, saved.inputs, saved.residual[index - 1] if index else None, saved.dense, start)
        gradient, second, third = _body_backward(facts, saved, index, parts, (back.residual, new[..., own:]))
        projection = None
        if index:
            back, first = _first_backward(facts, saved, index, start, gradient, back)
        else:
            shortcut = jnp.concatenate([back.residual, new[..., :own]], axis=-1)
            inputs, first, projection = _entry_backward(facts, saved, gradient, shortcut)
        found.append(Block(first, second, third, projection))
    gradients = jax.tree.map(lambda a, like: a.astype(like.dtype), tuple(reversed(found)), saved.blocks)
    return inputs, gradients, None


stage.defvjp(_forward, _backward)
