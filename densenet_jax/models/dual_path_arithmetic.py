"""The arithmetic of a dual-path stage that normalises each map once, and its derivative.

A block reads the residual path and the dense path together. The residual path is another sum in every block: it is
normalised once for its readers. The dense path only grows: what a block adds to it is normalised once for all blocks
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
from densenet_jax.models.layers import Moments, batch_moments, normalise
from densenet_jax.models.normalisation import Normalisation
from densenet_jax.models.readers import Reader, sum_by_group
from densenet_jax.models.split_readers import (
    MultiGradients,
    MultiReader,
    read_grouped,
    read_grouped_gradients,
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
    """Something for each map that a block makes: float[c] near the means of all (a shift), or their moments.

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
    """What is static in a stage's arithmetic.

    Attributes:
      options: of the stage.
      arithmetic: how it is computed.
      normalises: the two paths are normalised by their own moments; False where their norms are frozen, whose running
        statistics are folded into scale and bias: then x^ is x itself.
      normalises_second, normalises_third: the same of each block's other norms.
    """

    options: StageOptions
    arithmetic: Arithmetic
    normalises: bool
    normalises_second: tuple[bool, ...]
    normalises_third: tuple[bool, ...]


class Outputs(NamedTuple):
    """x^ of both paths joined, float[b, h, w, c], with its moments; and all moments, which have no derivative."""

    values: Array
    moments: Moments
    seen: Maps


class Residuals(NamedTuple):
    """What the backward pass needs; second and third, outputs of convolutions, are None under remat."""

    inputs: Array
    residual: tuple[Array, ...]
    dense: Any
    second: tuple[Array | None, ...]
    third: tuple[Array | None, ...]
    seen: Maps
    blocks: tuple[Block, ...]


def _normalised(x: Array, normalises: bool, shift: Array, options: StageOptions) -> tuple[Array, Moments]:
    """x^ in x's dtype, and the moments; x itself with the moments that leave it alone where nothing normalises."""
    if not normalises:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return x, Moments(jnp.zeros((1, x.shape[-1]), wide), jnp.ones((1, x.shape[-1]), wide))
    moments = batch_moments(x, options.norm.group_size, shift)
    return _again(x, moments, normalises, options), moments


def _again(x: Array, moments: Moments, normalises: bool, options: StageOptions) -> Array:
    return normalise(x, moments, options.norm.epsilon).astype(x.dtype) if normalises else x


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


def _forward(facts: Facts, inputs: Array, blocks: tuple[Block, ...], shifts: Maps) -> tuple[Outputs, Residuals]:
    options, arithmetic = facts.options, facts.arithmetic
    ends = _dense_ends(blocks)
    second: list[Array | None] = []
    third: list[Array | None] = []
    residuals: list[Array] = []
    seen: list[tuple[Moments, ...]] = []
    dense: Any = None
    total: Array | None = None
    for index, block in enumerate(blocks):
        stride = 1 if index else options.stride
        parts = _parts(facts, inputs, residuals[-1] if index else None, dense, ends[index - 1])
        (out,) = read_parts(parts, block.first, arithmetic)
        second.append(None if options.remat else out)
        out, of_second = _normalised(out, facts.normalises_second[index], shifts.second[index], options)
        out = read_grouped(out, block.second, stride, options.groups)
        third.append(None if options.remat else out)
        out, of_third = _normalised(out, facts.normalises_third[index], shifts.third[index], options)
        new, new_dense = read_parts((out,), block.third, arithmetic)
        if block.projection is not None:
            shortcut, width = read_grouped(inputs, block.projection, stride, 1), new.shape[-1]
            total = shortcut[..., :width]
            new_dense = jnp.concatenate([shortcut[..., width:], new_dense], axis=-1)
        assert total is not None
        total = total + new
        x, of_residual = _normalised(total, facts.normalises, shifts.residual[index], options)
        residuals.append(x)
        x, of_dense = _normalised(new_dense, facts.normalises, shifts.dense[index], options)
        dense = _put(dense, x, ends[index] - x.shape[-1], ends[-1], arithmetic)
        seen.append((of_second, of_third, of_residual, of_dense))
    moments = Maps(*zip(*seen, strict=True))
    values = jnp.concatenate([residuals[-1], _columns(dense, 0, ends[-1])], axis=-1)
    outputs = Outputs(values, joined([moments.residual[-1], *moments.dense]), moments)
    return outputs, Residuals(inputs, tuple(residuals), dense, tuple(second), tuple(third), moments, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def stage(facts: Facts, inputs: Array, blocks: tuple[Block, ...], shifts: Maps) -> Outputs:
    """Both paths after the blocks, of x^ of what the first reads; only values and their moments have a derivative."""
    return _forward(facts, inputs, blocks, shifts)[0]


class _Open(NamedTuple):
    """What has come back so far: the gradient of the residual sum, and of x^ of the dense path with its sums."""

    residual: Array
    dense: Array
    dense_sums: Sums


def gradient_sums(gradient: Array, normalised: Array, groups: int) -> Sums:
    """Of a gradient of x^ and of it times x^, over each group of examples."""
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    return sum_by_group(gradient, groups), sum_by_group(gradient.astype(wide) * normalised, groups)


def _reader_sums(scale: Array, of_scale: Array, of_bias: Array) -> Sums:
    """The same, from the gradients of a reader's scale and bias."""
    scale = scale.astype(of_scale.dtype)[None, :]
    return of_bias * scale, of_scale * scale


def _raw_gradient(
    gradient: Array,
    normalised: Array,
    moments: Moments,
    sums: Sums,
    normalises: bool,
    options: StageOptions,
    of_moments: Moments | None = None,
) -> Array:
    """The gradient of raw values, given that of x^, in x^'s dtype."""
    nothing = Moments(jnp.zeros((), sums[0].dtype), jnp.zeros((), sums[0].dtype))
    norm = Normalisation(moments, of_moments or nothing, options.norm.epsilon if normalises else None)
    return norm.gradient(gradient, normalised, sums).astype(normalised.dtype)


def _hidden(facts: Facts, saved: Residuals, index: int, parts: Sequence[Array], stride: int) -> tuple[Array, Array]:
    """x^ of what the second and the third convolution of a block read."""
    options, block = facts.options, saved.blocks[index]
    second, third = saved.second[index], saved.third[index]
    if second is None:
        (second,) = read_parts(parts, block.first, facts.arithmetic)
    second = _again(second, saved.seen.second[index], facts.normalises_second[index], options)
    if third is None:
        third = read_grouped(second, block.second, stride, options.groups)
    return second, _again(third, saved.seen.third[index], facts.normalises_third[index], options)


def _summed(found: MultiGradients) -> MultiReader:
    """The parameters' gradients, of all groups."""
    return MultiReader(found.scale.sum(axis=0), found.bias.sum(axis=0), found.kernels)


def _body_backward(
    facts: Facts, saved: Residuals, index: int, parts: Sequence[Array], gradients: tuple[Array, Array]
) -> tuple[Array, Reader, MultiReader]:
    """From what a block adds to the two paths to the output of its first convolution."""
    options, block = facts.options, saved.blocks[index]
    stride = 1 if index else options.stride
    second, third = _hidden(facts, saved, index, parts, stride)
    moments = saved.seen.third[index]
    found = read_parts_gradients((third,), block.third, gradients, moments.mean.shape[0], facts.arithmetic)
    sums = _reader_sums(block.third.scale, found.scale, found.bias)
    raw = _raw_gradient(found.inputs[0], third, moments, sums, facts.normalises_third[index], options)
    moments = saved.seen.second[index]
    grouped = read_grouped_gradients(second, block.second, raw, moments.mean.shape[0], stride, options.groups)
    sums = _reader_sums(block.second.scale, grouped.scale, grouped.bias)
    raw = _raw_gradient(grouped.inputs, second, moments, sums, facts.normalises_second[index], options)
    own = Reader(grouped.scale.sum(axis=0), grouped.bias.sum(axis=0), grouped.kernel)
    return raw, own, _summed(found)


def _first_backward(
    facts: Facts, saved: Residuals, index: int, end: int, gradient: Array, back: _Open
) -> tuple[_Open, MultiReader]:
    """From the output of a later block's first convolution to the two paths before the block."""
    reader, options = saved.blocks[index].first, facts.options
    normalised, moments = saved.residual[index - 1], saved.seen.residual[index - 1]
    width = normalised.shape[-1]
    parts = _parts(facts, saved.inputs, normalised, saved.dense, end)
    found = read_parts_gradients(parts, reader, (gradient,), moments.mean.shape[0], facts.arithmetic)
    joined_inputs = found.inputs[0]
    of_residual, of_dense = found.inputs if len(parts) > 1 else (joined_inputs[..., :width], joined_inputs[..., width:])
    sums = _reader_sums(reader.scale, found.scale, found.bias)
    own = (sums[0][:, :width], sums[1][:, :width])
    raw = _raw_gradient(of_residual, normalised, moments, own, facts.normalises, options)
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
    other = read_grouped_gradients(inputs, block.projection, shortcut, 1, facts.options.stride, 1)
    projection = Reader(other.scale.sum(axis=0), other.bias.sum(axis=0), other.kernel)
    return (found.inputs[0] + other.inputs).astype(inputs.dtype), _summed(found), projection


def _open(facts: Facts, saved: Residuals, cotangents: Outputs) -> _Open:
    """What the gradient of the stage's x^ is of the last residual sum and of the dense path."""
    width, moments = saved.residual[-1].shape[-1], saved.seen.residual[-1]
    groups = moments.mean.shape[0]
    residual, dense = cotangents.values[..., :width], cotangents.values[..., width:]
    of_moments = Moments(*(kind[:, :width] for kind in cotangents.moments))
    sums = gradient_sums(residual, saved.residual[-1], groups)
    raw = _raw_gradient(residual, saved.residual[-1], moments, sums, facts.normalises, facts.options, of_moments)
    return _Open(raw, dense, gradient_sums(dense, _columns(saved.dense, 0, dense.shape[-1]), groups))


def _backward(facts: Facts, saved: Residuals, cotangents: Outputs) -> tuple[Any, ...]:
    ends, width = _dense_ends(saved.blocks), saved.residual[-1].shape[-1]
    back = _open(facts, saved, cotangents)
    found: list[Block] = []
    inputs = None
    for index in reversed(range(len(saved.blocks))):
        start, end = ends[index - 1] if index else 0, ends[index]
        new = _raw_gradient(
            back.dense[..., start:end],
            _columns(saved.dense, start, end),
            saved.seen.dense[index],
            (back.dense_sums[0][:, start:end], back.dense_sums[1][:, start:end]),
            facts.normalises,
            facts.options,
            Moments(*(kind[:, width + start : width + end] for kind in cotangents.moments)),
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
