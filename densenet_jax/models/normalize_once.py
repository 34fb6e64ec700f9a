"""The dense block that normalizes each feature map once, with its own derivative.

All batch norms that read one feature map in training compute the same mean and variance of it: the statistics belong
to the feature map, only scale and bias belong to the reader. So each map is normalized once, when it is made, and only
the normalized x^ is kept; a layer reads relu(scale * x^ + bias). In the backward pass the gradients of x^ add up over
all readers before one application of the normalization's own derivative, and what was rectified is recomputed: memory
grows linearly with depth (what 1707.06990 pays a second forward pass for).

The function is that of `dense_block.plain_dense_block`, up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from densenet_jax.kernels.select import KERNEL_DTYPES, BlockShape
from densenet_jax.models.arithmetic import ARITHMETIC, Arithmetic, arithmetic_with_kernels
from densenet_jax.models.dense_block import (
    BlockOptions,
    BlockResult,
    Form,
    LayerArrays,
    LayerMoments,
    plain_dense_block,
)
from densenet_jax.models.layers import FeatureMap, NormArrays, NormOptions, fold_running
from densenet_jax.models.normalize_once_arithmetic import Facts, Layer, Outputs, Shifts, block, columns
from densenet_jax.models.readers import Reader, is_read_by_library


def _reader(norm: NormArrays, kernel: Array, options: NormOptions) -> Reader:
    if norm.frozen:
        return Reader(*fold_running(norm, options.epsilon), kernel)
    return Reader(norm.scale, norm.bias, kernel)


def _shifts(layers: Sequence[LayerArrays], new: int) -> Shifts:
    """Running means: of a map by its first reader; the last map, a convolution's output, has none here."""
    hidden = tuple(None if layer.norm2 is None or layer.norm2.frozen else layer.norm2.mean for layer in layers)
    if layers[0].norm1.frozen:
        return Shifts(None, hidden, (None,) * len(layers))
    means = [layer.norm1.mean for layer in layers]
    return Shifts(means[0], hidden, (*(mean[-new:] for mean in means[1:]), jnp.zeros_like(means[0], shape=(new,))))


def normalize_once(
    inputs: Float[Array, "b h w c"],
    layers: Sequence[LayerArrays],
    key: Array | None,
    options: BlockOptions,
    train: bool,
    platform: str = "",
    kernels: str = "auto",
    mesh: Mesh | None = None,
) -> BlockResult:
    """The block in its normalize-once form; in evaluation the plain one, or all norms frozen where one buffer is read.

    A block in which some first norms are frozen and others are not takes the plain form: its maps have two kinds of
    statistics.

    Args:
      inputs: of the block.
      layers: their arrays.
      key: for dropout.
      options: of the block; with remat, hidden maps are recomputed as well and only x^ is kept.
      train: batch statistics instead of running ones.
      platform: a key of ARITHMETIC; "" is the platform JAX runs on.
      kernels: what is wanted of `kernels.choice.choose`, or "interpret" for tests of the kernels.
      mesh: over which the batch is divided; None is JAX's one device, or unknown.

    Raises:
      UserError: kernels are wanted that do not exist for the platform or the dtype.
    """
    platform = platform or jax.default_backend()
    if not train or all(norm.frozen for layer in layers for norm in (layer.norm1, layer.norm2) if norm is not None):
        options = replace(options, norm=replace(options.norm, group_size=0))  # which need not divide this batch
    if not train:
        kernels = "auto" if kernels == "pallas" else kernels  # only training is refused what there is not
    arithmetic = _arithmetic(inputs, layers, options, platform, kernels, mesh)
    if not train and _is_evaluated_from_buffer(inputs, layers[0], options, arithmetic):
        layers, key = [_frozen(layer) for layer in layers], None
    elif not train or len({layer.norm1.frozen for layer in layers}) > 1:
        return plain_dense_block(inputs, layers, key, options, train)
    readers = tuple(
        Layer(
            _reader(layer.norm1, layer.kernel1, options.norm),
            None if layer.norm2 is None or layer.kernel2 is None else _reader(layer.norm2, layer.kernel2, options.norm),
        )
        for layer in layers
    )
    kernel = layers[-1].kernel1 if layers[-1].kernel2 is None else layers[-1].kernel2
    shifts = _shifts(layers, kernel.shape[-1])
    outputs = block(Facts(options, arithmetic), inputs.astype(options.dtype), readers, shifts, key)
    return _result(outputs, layers)


def _is_evaluated_from_buffer(inputs: Array, first: LayerArrays, options: BlockOptions, arithmetic: Arithmetic) -> bool:
    """Whether something reads the front of a buffer in evaluation, which then holds all maps, as they are."""
    reader = _reader(first.norm1, first.kernel1, options.norm)
    by_library = arithmetic.library and is_read_by_library(inputs.astype(options.dtype), reader)
    return by_library or arithmetic.kernels != "xla"


def _frozen(layer: LayerArrays) -> LayerArrays:
    """The layer with the norms of evaluation."""
    norm2 = None if layer.norm2 is None else replace(layer.norm2, frozen=True)
    return layer._replace(norm1=replace(layer.norm1, frozen=True), norm2=norm2)


def _arithmetic(
    inputs: Array,
    layers: Sequence[LayerArrays],
    options: BlockOptions,
    platform: str,
    wanted: str,
    mesh: Mesh | None,
) -> Arithmetic:
    last = layers[-1]
    hidden = 0 if last.kernel2 is None else last.kernel1.shape[-1]
    made = (last.kernel1 if last.kernel2 is None else last.kernel2).shape[-1]
    examples, height, width, channels = inputs.shape
    drops = options.dropout_rate > 0
    shape = BlockShape(examples, height, width, channels, len(layers), hidden, made, drops)
    return arithmetic_with_kernels(platform, options.dtype, shape, options.norm.group_size, wanted, mesh)


def _result(outputs: Outputs, layers: Sequence[LayerArrays]) -> BlockResult:
    hidden, are_frozen = iter(outputs.hidden_moments), layers[0].norm1.frozen
    seen = []
    for layer in layers:
        first = None if are_frozen else columns(outputs.moments, 0, layer.norm1.scale.shape[0])
        second = None if layer.norm2 is None else next(hidden)
        seen.append(LayerMoments(first, None if layer.norm2 is None or layer.norm2.frozen else second))
    return BlockResult(FeatureMap(outputs.values, None if are_frozen else outputs.moments), tuple(seen))


FORMS: dict[str, Form] = {
    "normalize_once": normalize_once,
    **{f"normalize_once_{name}": functools.partial(normalize_once, platform=name) for name in ARITHMETIC},
    "plain": plain_dense_block,
}
# The forms that there are kernels for, with them.
KERNEL_FORMS: dict[str, Form] = {
    "normalize_once": functools.partial(normalize_once, kernels="pallas"),
    **{
        f"normalize_once_{name}": functools.partial(normalize_once, platform=name, kernels="pallas")
        for name in KERNEL_DTYPES
    },
}
