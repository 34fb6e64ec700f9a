"""A dense block that normalizes each map once: its forward pass and its own derivative.

`normalize_once.py` says what that is.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from densenet_jax.kernels.tpu.tiles import laid_out
from densenet_jax.models import block_maps, fused_reader
from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.dense_block import BlockOptions, layer_key
from densenet_jax.models.fused_layer import layer_gradients
from densenet_jax.models.layers import Moments, dropout, group_count
from densenet_jax.models.normalization import Normalization, norm_of
from densenet_jax.models.readers import (
    Reader,
    ReaderGradients,
    add_read_gradients,
    adds_in_place,
    read_gradients,
    read_gradients_before_relu,
    read_with_moments,
    rectifier_gradients,
    rectify,
    sums_by_reader,
    sums_of_gradient,
)


class Layer(NamedTuple):
    """The differentiated arrays of one dense layer; second is None without a bottleneck."""

    first: Reader
    second: Reader | None


class Shifts(NamedTuple):
    """Near the means that moments are taken about (running means); they change no result but its rounding.

    None of maps whose norms are frozen, and of hidden ones that there are none of.
    """

    inputs: Array | None
    hidden: tuple[Array | None, ...]
    outputs: tuple[Array | None, ...]


class Facts(NamedTuple):
    """What is static in a block's arithmetic: the block's options, and how it is computed."""

    options: BlockOptions
    arithmetic: Arithmetic


class Outputs(NamedTuple):
    """The block's x^ float[b, h, w, c] with its moments, and the moments of each layer's hidden map."""

    values: Array
    moments: Moments
    hidden_moments: tuple[Moments, ...]


class Residuals(NamedTuple):
    """What the backward pass needs; hidden maps that are recomputed are None.

    Where a shift is None, norms are frozen, whose running statistics are folded into scale and bias: x^ is the map.
    """

    maps: Any
    moments: Moments
    hidden: tuple[Array | None, ...]
    hidden_moments: tuple[Moments, ...]
    layers: tuple[Layer, ...]
    shifts: Shifts
    key: Array | None


def _dropped(
    out: Array, moments: Moments | None, options: BlockOptions, key: Array | None
) -> tuple[Array, Moments | None]:
    """The map with some of it dropped, of which nothing is known then."""
    if key is None or not options.dropout_rate:
        return out, moments
    return dropout(out, options.dropout_rate, key), None


def _hidden(
    maps: Any, layer: Layer, key: Array | None, facts: Facts, shift: Array | None
) -> tuple[Array, Moments | None]:
    """What a layer's first convolution gives, and its moments about shift where they come with it."""
    options, arithmetic = facts.options, facts.arithmetic
    found: tuple[Array, Moments | None]
    if arithmetic.kernels != "xla":
        shift = jnp.zeros(layer.first.kernel.shape[-1], jnp.float32) if shift is None else shift
        groups = group_count(maps.shape[0], options.norm.group_size)
        found = fused_reader.read_with_moments(maps, layer.first, groups, shift, arithmetic)
    else:
        front = block_maps.readable(maps, layer.first.scale.shape[0], arithmetic)
        found = read_with_moments(front, layer.first, shift, options.norm, arithmetic)
        if arithmetic.layer_gradients == "pallas":
            found = laid_out(found[0]), found[1]
    if layer.second is None:
        return _dropped(*found, options, key)
    return _dropped(*found, options, layer_key(key, 0) if options.dropout_every_convolution else None)


def _forward(
    facts: Facts, inputs: Array, layers: tuple[Layer, ...], shifts: Shifts, key: Array | None
) -> tuple[Outputs, Residuals]:
    options, arithmetic = facts.options, facts.arithmetic
    keeps_hidden = not (options.remat or arithmetic.recomputes_hidden)
    first = norm_of(inputs, options.norm, shifts.inputs)
    widths = [layer.first.scale.shape[0] for layer in layers]
    last = layers[-1].second or layers[-1].first
    maps = block_maps.begin(first.apply(inputs), widths[-1] + last.kernel.shape[-1], arithmetic)
    all_moments, hidden_maps, hidden_moments = [first.moments], [], []
    for index, layer in enumerate(layers):
        own_key, shift, hidden_shift = layer_key(key, index), shifts.outputs[index], shifts.hidden[index]
        if layer.second is None:
            out, moments = _hidden(maps, layer, own_key, facts, shift)
        else:
            out, moments = _hidden(maps, layer, own_key, facts, hidden_shift)
            hidden_maps.append(out if keeps_hidden else None)
            norm = norm_of(out, options.norm, hidden_shift, moments)
            hidden_moments.append(norm.moments)
            out, moments = read_with_moments(out, layer.second, shift, options.norm, arithmetic, norm)
            out, moments = _dropped(out, moments, options, layer_key(own_key, 1))
        norm = norm_of(out, options.norm, shift, moments)
        all_moments.append(norm.moments)
        maps = block_maps.put(maps, norm.apply(out), widths[index])
    if arithmetic.kernels != "xla":  # or XLA reads from the buffer as it was before the last layers, and copies it
        maps = lax.optimization_barrier(maps)
    joined = Moments(*(jnp.concatenate(parts, axis=-1) for parts in zip(*all_moments, strict=True)))
    values = block_maps.front(maps, joined.mean.shape[-1])
    outputs = Outputs(values, joined, tuple(hidden_moments))
    return outputs, Residuals(maps, joined, tuple(hidden_maps), tuple(hidden_moments), layers, shifts, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block(facts: Facts, inputs: Array, layers: tuple[Layer, ...], shifts: Shifts, key: Array | None) -> Outputs:
    """The block's normalized maps and all moments, differentiable in its input and its layers' arrays.

    Args:
      facts: what is static.
      inputs: float[b, h, w, c], the raw input in the dtype of the activations.
      layers: their readers' arrays.
      shifts: that moments are taken about.
      key: for dropout.
    """
    return _forward(facts, inputs, layers, shifts, key)[0]


def columns(moments: Moments, start: int, end: int) -> Moments:
    """Those of some channels."""
    return Moments(moments.mean[:, start:end], moments.variance[:, start:end])


def _norm_of_maps(facts: Facts, saved: Residuals, cotangents: Outputs, start: int, end: int) -> Normalization:
    """How some of the block's maps became x^."""
    epsilon = None if saved.shifts.inputs is None else facts.options.norm.epsilon
    return Normalization(columns(saved.moments, start, end), epsilon, columns(cotangents.moments, start, end))


def _norm_of_hidden(facts: Facts, saved: Residuals, cotangents: Outputs, index: int) -> Normalization:
    """The same of what a layer's first convolution gave."""
    epsilon = None if saved.shifts.hidden[index] is None else facts.options.norm.epsilon
    return Normalization(saved.hidden_moments[index], epsilon, cotangents.hidden_moments[index])


def _reader_gradients(found: ReaderGradients, reader: Reader) -> Reader:
    """The parameters' gradients in their own dtypes."""
    return Reader(
        found.scale.sum(axis=0).astype(reader.scale.dtype),
        found.bias.sum(axis=0).astype(reader.bias.dtype),
        found.kernel.astype(reader.kernel.dtype),
    )


def _kept_hidden(facts: Facts, saved: Residuals, index: int) -> Array:
    """What a layer's first convolution gave, computed again if it was not kept."""
    kept = saved.hidden[index]
    if kept is None:
        return _hidden(saved.maps, saved.layers[index], layer_key(saved.key, index), facts, None)[0]
    return kept


def _second_backward(
    facts: Facts, reader: Reader, norm: Normalization, hidden: Array, gradient: Array
) -> tuple[Array, Reader]:
    """From a layer's raw output to what its second norm normalizes."""
    normalized, groups = norm.apply(hidden), norm.moments.mean.shape[0]
    if facts.arithmetic.kernels == "xla":
        found = read_gradients(hidden, reader, gradient, groups, facts.arithmetic, norm)
        of_normalized = found.inputs
    else:
        rectified, found = read_gradients_before_relu(normalized, reader, gradient, groups, facts.arithmetic)
        # Masked once for the sums above and once here; XLA would store the masked gradient for both.
        rectified = lax.optimization_barrier(rectified)
        activation = rectify(normalized, reader.scale, reader.bias)
        of_normalized = rectifier_gradients(rectified, activation, normalized, reader.scale, groups)[0]
    raw = norm.gradient(of_normalized, normalized, sums_by_reader(reader.scale, found.scale, found.bias))
    return raw, _reader_gradients(found, reader)


def _layer_backward(
    facts: Facts, saved: Residuals, index: int, total: Array, gradient: Array, cotangents: Outputs
) -> tuple[ReaderGradients, Layer]:
    """From a layer's raw output to the maps it read: their gradients, added to total, and the layer's own."""
    layer, key, options = saved.layers[index], layer_key(saved.key, index), facts.options
    second = None
    if layer.second is None:
        gradient = dropout(gradient, options.dropout_rate, key)
    else:
        gradient = dropout(gradient, options.dropout_rate, layer_key(key, 1))
        hidden, norm = _kept_hidden(facts, saved, index), _norm_of_hidden(facts, saved, cotangents, index)
        gradient, second = _second_backward(facts, layer.second, norm, hidden, gradient)
        if options.dropout_every_convolution:
            gradient = dropout(gradient, options.dropout_rate, layer_key(key, 0))
    groups, arithmetic = saved.moments.mean.shape[0], facts.arithmetic
    if arithmetic.kernels != "xla":
        found = fused_reader.add_read_gradients(total, saved.maps, layer.first, gradient, groups, arithmetic)
    elif arithmetic.library and adds_in_place(saved.maps, total, layer.first, groups):
        found = add_read_gradients(total, saved.maps, layer.first, gradient)
    else:
        start = layer.first.scale.shape[0]
        front = block_maps.readable(saved.maps, start, arithmetic)
        found = read_gradients(front, layer.first, gradient, groups, arithmetic)
        added = (total[..., :start].astype(found.inputs.dtype) + found.inputs).astype(total.dtype)
        found = found._replace(inputs=added)
    return found, Layer(_reader_gradients(found, layer.first), second)


def _fused_layer_backward(
    facts: Facts, saved: Residuals, index: int, back: tuple[Array, tuple[Array, Array]], cotangents: Outputs
) -> tuple[ReaderGradients, Layer]:
    """`_layer_backward` by the kernels of `fused_layer`; back is the gradient of x^ so far and its two sums."""
    (total, sums), layer = back, saved.layers[index]
    assert layer.second is not None
    start = layer.first.scale.shape[0]
    end = start + layer.second.kernel.shape[-1]
    count = total.size // total.shape[-1] // sums[0].shape[0]
    made = _norm_of_maps(facts, saved, cotangents, start, end)
    of_raw = made.factors((sums[0][:, start:end], sums[1][:, start:end]), count)
    hidden, norm = _kept_hidden(facts, saved, index), _norm_of_hidden(facts, saved, cotangents, index)
    readers = (layer.first, layer.second)
    found, second = layer_gradients(total, saved.maps, hidden, readers, of_raw, norm, facts.arithmetic)
    return found, Layer(_reader_gradients(found, layer.first), _reader_gradients(second, layer.second))


def _backward(facts: Facts, saved: Residuals, cotangents: Outputs) -> tuple[Any, ...]:
    groups = saved.moments.mean.shape[0]
    total, width = cotangents.values, cotangents.values.shape[-1]
    sums = sums_of_gradient(total, block_maps.front(saved.maps, width), groups)
    layers: list[Layer] = []

    def raw_gradient(start: int, end: int) -> Array:
        normalized = block_maps.front(saved.maps, end)[..., start:end]
        found = _norm_of_maps(facts, saved, cotangents, start, end).gradient(
            total[..., start:end], normalized, (sums[0][:, start:end], sums[1][:, start:end])
        )
        return lax.optimization_barrier(found) if facts.arithmetic.stores_gradients else found

    for index in reversed(range(len(saved.layers))):
        reader = saved.layers[index].first
        start = reader.scale.shape[0]
        if facts.arithmetic.layer_gradients == "xla":
            gradient = raw_gradient(start, width)
            found, layer = _layer_backward(facts, saved, index, total, gradient, cotangents)
        else:
            found, layer = _fused_layer_backward(facts, saved, index, (total, sums), cotangents)
        total = found.inputs
        if facts.arithmetic.finishes_layers:
            total, layer = lax.optimization_barrier((total, layer))
        layers.append(layer)
        own = sums_by_reader(reader.scale, found.scale, found.bias)
        sums = (sums[0][:, :start] + own[0], sums[1][:, :start] + own[1])
        width = start
    return raw_gradient(0, width), tuple(reversed(layers)), None, None


block.defvjp(_forward, _backward)
