"""Reading a normalised map that lies in parts, by several 1x1 kernels behind one scale and bias, and by a grouped one.

A product over joined channels is the sum of the products over the parts, so nothing has to be joined; and outputs that
go different ways come from kernels of their own, so nothing has to be taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.layers import convolve
from densenet_jax.models.readers import (
    Reader,
    ReaderGradients,
    contract,
    read,
    read_gradients,
    rectifier_gradients,
    rectify,
)


class MultiReader(NamedTuple):
    """What c channels are read with: scale and bias float[c], each kernel float[1, 1, c, o] with an o of its own."""

    scale: Array
    bias: Array
    kernels: tuple[Array, ...]


class MultiGradients(NamedTuple):
    """Gradients of one `MultiReader`.

    Attributes:
      inputs: float[b, h, w, *] of the channels read of each part, in float32 or wider.
      scale, bias: float[g, c], a row for each group of examples.
      kernels: like the reader's, float32 or wider.
    """

    inputs: tuple[Array, ...]
    scale: Array
    bias: Array
    kernels: tuple[Array, ...]


def _pieces(parts: Sequence[Array], reader: MultiReader) -> Iterator[tuple[Array, MultiReader]]:
    """Each part with the reader of its channels; the last part may have more channels than are read."""
    start, width = 0, reader.scale.shape[0]
    for part in parts:
        end = min(start + part.shape[-1], width)
        kernels = tuple(kernel[:, :, start:end] for kernel in reader.kernels)
        yield part, MultiReader(reader.scale[start:end], reader.bias[start:end], kernels)
        start = end


def read_parts(
    parts: Sequence[Float[Array, "b h w _"]], reader: MultiReader, arithmetic: Arithmetic
) -> tuple[Float[Array, "b h w _"], ...]:
    """One output a kernel, of a normalised map whose channels are those of its parts, one after the other."""
    products = [
        [read(part, Reader(own.scale, own.bias, kernel), arithmetic) for kernel in own.kernels]
        for part, own in _pieces(parts, reader)
    ]
    outputs = products[0]
    for more in products[1:]:
        outputs = [a + b for a, b in zip(outputs, more, strict=True)]
    return tuple(outputs)


def read_parts_gradients(
    parts: Sequence[Float[Array, "b h w _"]],
    reader: MultiReader,
    gradients: Sequence[Float[Array, "b h w _"]],
    groups: int,
    arithmetic: Arithmetic,
) -> MultiGradients:
    """The derivative of `read_parts`.

    Args:
      parts: what was read.
      reader: with what.
      gradients: of each output.
      groups: of examples that scale and bias gradients are wanted for.
      arithmetic: how.
    """
    found = [_part_gradients(part, own, gradients, groups, arithmetic) for part, own in _pieces(parts, reader)]
    return MultiGradients(
        tuple(one.inputs[0] for one in found),
        jnp.concatenate([one.scale for one in found], axis=-1),
        jnp.concatenate([one.bias for one in found], axis=-1),
        tuple(jnp.concatenate(kernels, axis=2) for kernels in zip(*(one.kernels for one in found), strict=True)),
    )


def _part_gradients(
    x: Array, reader: MultiReader, gradients: Sequence[Array], groups: int, arithmetic: Arithmetic
) -> MultiGradients:
    found = [
        read_gradients(x, Reader(reader.scale, reader.bias, kernel), gradient, groups, arithmetic)
        for kernel, gradient in zip(reader.kernels, gradients, strict=True)
    ]
    kernels = tuple(one.kernel for one in found)
    if arithmetic.library or len(found) == 1:
        inputs, scale, bias = (sum(kind[1:], kind[0]) for kind in zip(*(one[:3] for one in found), strict=True))
        return MultiGradients((inputs,), scale, bias, kernels)
    # Of the kernels' input gradients the sum is masked and summed over once; what stands unused above is not compiled.
    x = x[..., : reader.scale.shape[0]]
    activation = rectify(x, reader.scale, reader.bias)
    _, pullback = jax.vjp(lambda a: tuple(contract(a, kernel, arithmetic) for kernel in reader.kernels), activation)
    inputs, scale, bias = rectifier_gradients(pullback(tuple(gradients))[0], activation, x, reader.scale, groups)
    return MultiGradients((inputs,), scale, bias, kernels)


def read_grouped(
    x: Float[Array, "b h w c"], reader: Reader, stride: int, channel_groups: int
) -> Float[Array, "b h2 w2 o"]:
    """relu(scale * x + bias) by a convolution in groups of channels; kernel float[k, k, c / channel_groups, o]."""
    padding = reader.kernel.shape[0] // 2
    activation = rectify(x, reader.scale, reader.bias)
    return convolve(activation, reader.kernel, stride=stride, padding=padding, groups=channel_groups)


def read_grouped_gradients(
    x: Float[Array, "b h w c"],
    reader: Reader,
    gradient: Float[Array, "b h2 w2 o"],
    groups: int,
    stride: int,
    channel_groups: int,
) -> ReaderGradients:
    """The derivative of `read_grouped`; groups are those of examples that scale and bias gradients are wanted for."""
    padding = reader.kernel.shape[0] // 2
    activation = rectify(x, reader.scale, reader.bias)

    def convolved(activation: Array, kernel: Array) -> Array:
        return convolve(activation, kernel, stride=stride, padding=padding, groups=channel_groups)

    _, pullback = jax.vjp(convolved, activation, reader.kernel)
    rectified, kernel = pullback(gradient)
    return ReaderGradients(*rectifier_gradients(rectified, activation, x, reader.scale, groups), kernel)
