"""A dense block that normalizes each feature map once: its forward pass and its own derivative."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.select import BlockShape
from densenet_jax.models import densenet
from densenet_jax.models.densenet import BlockOptions
from densenet_jax.models.fused.backend import Backend, Buffer, DenseLayer, SavedLayer
from densenet_jax.models.fused.norm import (
    Normalization,
    concatenate_stats,
    make_normalization,
)
from densenet_jax.models.fused.norm_relu_conv import (
    NormReluConv,
    Operands,
    scale_and_bias,
    sum_gradient,
)
from densenet_jax.models.layers import BatchStats, FeatureMap, NormArrays, dropout, fold_key


class LayerNorms(NamedTuple):
    """The norms of one dense layer; second is None without a bottleneck."""

    first: NormArrays
    second: NormArrays | None


class Shifts(NamedTuple):
    """Running means, subtracted before sums for accuracy; None for frozen norms and missing bottlenecks."""

    inputs: Array | None
    bottlenecks: tuple[Array | None, ...]
    outputs: tuple[Array | None, ...]


class Config(NamedTuple):
    """Static configuration: the block's options and its backend."""

    options: BlockOptions
    backend: Backend


class Outputs(NamedTuple):
    """The block's x_hat float[b, h, w, c] with its statistics, and the statistics of each layer's bottleneck."""

    values: Array
    stats: BatchStats
    bottleneck_stats: tuple[BatchStats, ...]


class Residuals(NamedTuple):
    """Values kept for the backward pass; a bottleneck that is recomputed is None."""

    buffer: Buffer
    stats: BatchStats
    bottlenecks: tuple[Array | None, ...]
    bottleneck_stats: tuple[BatchStats, ...]
    layers: tuple[DenseLayer, ...]
    shifts: Shifts
    key: Array | None


def fused_dense_block(
    layers: Sequence[densenet.DenseLayer],
    x: Float[Array, "b h w c"],
    train: bool,
    key: Array | None,
    options: BlockOptions,
    backend: Backend,
) -> FeatureMap | None:
    """Computes `densenet.Plain.dense_block` with each feature map normalized once.

    Returns None where that is not possible or gains nothing: in training if some first norms are frozen and others are
    not, since a feature map would have two kinds of statistics; in evaluation unless kernels read a buffer.
    """
    norms = [LayerNorms(layer.norm1.arrays(), _second_norm(layer)) for layer in layers]
    if not train or all(norm.frozen for pair in norms for norm in pair if norm is not None):
        options = replace(options, norm=replace(options.norm, group_size=0))  # a group size need not divide this batch
    backend = backend.for_block(_shape(layers, x, options), options.dtype, options.norm.group_size)
    x = x.astype(options.dtype)
    if not train:
        if not backend.reads_buffer(x, layers[0].conv1.kernel):
            return None
        norms = [LayerNorms(_freeze(first), second and _freeze(second)) for first, second in norms]
        key = None
    are_frozen = norms[0].first.frozen
    if any(pair.first.frozen != are_frozen for pair in norms):
        return None
    arrays = tuple(_arrays(layer, pair, options) for layer, pair in zip(layers, norms, strict=True))
    outputs = _block(Config(options, backend), x, arrays, _shifts(norms, layers[0].growth_rate, backend), key)
    if train:
        _update_running(layers, norms, outputs, backend)
    return FeatureMap(outputs.values, None if are_frozen else outputs.stats)


def _freeze(norm: NormArrays) -> NormArrays:
    return replace(norm, frozen=True)


def _second_norm(layer: densenet.DenseLayer) -> NormArrays | None:
    return layer.norm2.arrays() if layer.bottleneck_width else None


def _shape(layers: Sequence[densenet.DenseLayer], x: Array, options: BlockOptions) -> BlockShape:
    examples, height, width, channels = x.shape
    growth = layers[0].growth_rate
    bottleneck = layers[0].bottleneck_width * growth
    drops = options.dropout_rate > 0
    return BlockShape(examples, height, width, channels, len(layers), bottleneck, growth, drops)


def _arrays(layer: densenet.DenseLayer, norms: LayerNorms, options: BlockOptions) -> DenseLayer:
    first = NormReluConv(*scale_and_bias(norms.first, options.norm), layer.conv1.kernel)
    if norms.second is None:
        return DenseLayer(first, None)
    return DenseLayer(first, NormReluConv(*scale_and_bias(norms.second, options.norm), layer.conv2.kernel))


def _shifts(norms: Sequence[LayerNorms], growth: int, backend: Backend) -> Shifts:
    """Takes a feature map's running mean from the first layer that reads it; no layer reads the last one."""
    bottlenecks = tuple(None if second is None or second.frozen else second.mean for _, second in norms)
    if norms[0].first.frozen:
        return Shifts(None, bottlenecks, (None,) * len(norms))
    means = [first.mean for first, _ in norms]
    outputs = backend.tails(means[1:], growth)
    return Shifts(means[0], bottlenecks, (*outputs, jnp.zeros_like(means[0], shape=(growth,))))


def _update_running(
    layers: Sequence[densenet.DenseLayer], norms: Sequence[LayerNorms], outputs: Outputs, backend: Backend
) -> None:
    updated = []
    for layer, (first, second), bottleneck in itertools.zip_longest(layers, norms, outputs.bottleneck_stats):
        if not first.frozen:
            updated.append((layer.norm1, outputs.stats))
        if second is not None and not second.frozen:
            updated.append((layer.norm2, bottleneck))
    backend.update_running(updated, outputs.values.size // outputs.values.shape[-1])


def _dropout_keys(options: BlockOptions, layer: DenseLayer, key: Array | None) -> tuple[Array | None, Array | None]:
    """Returns the keys for dropout after the first and the second convolution, those of `densenet.DenseLayer`."""
    if layer.second is None:
        return key, None
    return fold_key(key, 0) if options.dropout_every_convolution else None, fold_key(key, 1)


def _first_conv(
    config: Config, buffer: Buffer, layer: DenseLayer, key: Array | None, shift: Array | None
) -> tuple[Array, BatchStats | None]:
    """Returns the first convolution's output after dropout, and its statistics if the backend computes them."""
    out, stats = config.backend.conv_from_buffer(buffer, layer.first, shift, config.options.norm)
    return _drop(config.options, out, stats, key)


def _drop(
    options: BlockOptions, out: Array, stats: BatchStats | None, key: Array | None
) -> tuple[Array, BatchStats | None]:
    """Applies dropout; returns None for the statistics, which no longer hold."""
    if key is None or not options.dropout_rate:
        return out, stats
    return dropout(out, options.dropout_rate, key), None


def _forward(
    config: Config, inputs: Array, layers: tuple[DenseLayer, ...], shifts: Shifts, key: Array | None
) -> tuple[Outputs, Residuals]:
    options, backend = config.options, config.backend
    keeps_bottlenecks = not (options.remat or backend.remat_bottleneck)
    norm = make_normalization(inputs, options.norm, shifts.inputs)
    widths = [layer.first.scale.shape[0] for layer in layers]
    last = layers[-1].second or layers[-1].first
    buffer = backend.new_buffer(norm.apply(inputs), widths[-1] + last.kernel.shape[-1])
    all_stats, bottlenecks, bottleneck_stats = [norm.stats], [], []
    for index, layer in enumerate(layers):
        shift, bottleneck_shift = shifts.outputs[index], shifts.bottlenecks[index]
        after_first, after_second = _dropout_keys(options, layer, fold_key(key, index))
        first_shift = shift if layer.second is None else bottleneck_shift
        out, stats = _first_conv(config, buffer, layer, after_first, first_shift)
        if layer.second is not None:
            bottlenecks.append(out if keeps_bottlenecks else None)
            norm = make_normalization(out, options.norm, bottleneck_shift, stats)
            bottleneck_stats.append(norm.stats)
            out, stats = backend.norm_relu_conv_with_stats(Operands(out, layer.second, norm), shift, options.norm)
            out, stats = _drop(options, out, stats, after_second)
        norm = make_normalization(out, options.norm, shift, stats)
        all_stats.append(norm.stats)
        buffer = backend.append(buffer, norm.apply(out), widths[index])
    buffer = backend.finish_buffer(buffer)
    stats = concatenate_stats(all_stats)
    outputs = Outputs(backend.channels(buffer, 0, stats.mean.shape[-1]), stats, tuple(bottleneck_stats))
    return outputs, Residuals(buffer, stats, tuple(bottlenecks), tuple(bottleneck_stats), layers, shifts, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(config: Config, inputs: Array, layers: tuple[DenseLayer, ...], shifts: Shifts, key: Array | None) -> Outputs:
    """Computes x_hat of all feature maps and all statistics from raw inputs, differentiable in inputs and layers."""
    return _forward(config, inputs, layers, shifts, key)[0]


def _saved_layer(
    config: Config, saved: Residuals, cotangents: Outputs, index: int, norm: Normalization, sums: tuple[Array, Array]
) -> SavedLayer:
    options, layer, shift = config.options, saved.layers[index], saved.shifts.bottlenecks[index]
    keys = _dropout_keys(options, layer, fold_key(saved.key, index))
    bottleneck = bottleneck_norm = None
    if layer.second is not None:
        kept = saved.bottlenecks[index]
        recompute = functools.partial(_first_conv, config, saved.buffer, layer, keys[0], None)
        bottleneck = (lambda: recompute()[0]) if kept is None else (lambda: kept)
        epsilon = None if shift is None else options.norm.epsilon
        own = saved.bottleneck_stats[index]
        bottleneck_norm = Normalization(own, epsilon, cotangents.bottleneck_stats[index])
    return SavedLayer(layer, saved.buffer, norm, sums, bottleneck, bottleneck_norm, options.dropout_rate, keys)


def _backward(config: Config, saved: Residuals, cotangents: Outputs) -> tuple[Any, ...]:
    options, backend = config.options, config.backend
    epsilon = None if saved.shifts.inputs is None else options.norm.epsilon
    norm = Normalization(saved.stats, epsilon, cotangents.stats)
    total, width = cotangents.values, cotangents.values.shape[-1]
    sums = sum_gradient(total, backend.channels(saved.buffer, 0, width), saved.stats.mean.shape[0])
    layers: list[DenseLayer] = []
    for index in reversed(range(len(saved.layers))):
        conv = saved.layers[index].first
        start = conv.scale.shape[0]
        grads, layer = backend.layer_backward(_saved_layer(config, saved, cotangents, index, norm, sums), total)
        total = grads.x
        if backend.barrier_after_layer:
            total, layer = lax.optimization_barrier((total, layer))
        layers.append(layer)
        sums = backend.add_sums(sums, conv, grads)
        width = start
    grad_inputs = backend.grad_before_norm(total, saved.buffer, norm, sums, 0, width)
    return grad_inputs, tuple(reversed(layers)), None, None


_block.defvjp(_forward, _backward)
