"""Reading a normalized map that lies in parts, by several 1x1 kernels behind one scale and bias.

A product over joined channels is the sum of the products over the parts, so nothing has to be joined; and outputs that
go different ways come from kernels of their own, so nothing has to be taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.layers import Moments, NormOptions
from densenet_jax.models.normalization import Normalization
from densenet_jax.models.readers import (
    Reader,
    add_read_gradients,
    adds_in_place,
    contract,
    normalized,
    read_gradients,
    read_with_moments,
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


class Into(NamedTuple):
    """Where a reader's output goes.

    Attributes:
      total: what it is added to; None is nothing.
      shift: that moments of the sum are taken about; None: none are wanted.
    """

    total: Array | None = None
    shift: Array | None = None


def read_parts(
    parts: Sequence[Float[Array, "b h w _"]],
    reader: MultiReader,
    into: Sequence[Into],
    options: NormOptions,
    arithmetic: Arithmetic,
    norm: Normalization | None = None,
) -> tuple[tuple[Float[Array, "b h w _"], Moments | None], ...]:
    """One output a kernel, of a map whose channels are those of its parts, and its moments where they come with it.

    Args:
      parts: of the map, one after the other.
      reader: with what.
      into: where each output goes.
      options: of the norms whose moments are wanted.
      arithmetic: how.
      norm: what makes x^ of the map, which has one part then; None: it is that already.
    """
    pieces = list(_pieces(parts, reader))
    found = []
    for number, (total, shift) in enumerate(into):
        moments = None
        for part, own in pieces:
            one = Reader(own.scale, own.bias, own.kernels[number])
            about = shift if part is parts[-1] else None
            total, moments = read_with_moments(part, one, about, options, arithmetic, norm, total)
        assert total is not None
        found.append((total, moments))
    return tuple(found)


def read_parts_gradients(
    parts: Sequence[Float[Array, "b h w _"]],
    reader: MultiReader,
    gradients: Sequence[Float[Array, "b h w _"]],
    groups: int,
    arithmetic: Arithmetic,
    norm: Normalization | None = None,
    totals: Sequence[Array | None] = (None, None),
) -> MultiGradients:
    """The derivative of `read_parts`.

    Args:
      parts: what was read.
      reader: with what.
      gradients: of each output.
      groups: of examples that scale and bias gradients are wanted for.
      arithmetic: how.
      norm: as for `read_parts`.
      totals: what the gradients of each part's channels are added to, in place where nothing else reads it; it may have
        more channels, which come after. For one kernel, or where the library computes.
    """
    found = [
        _part_gradients(part, own, gradients, groups, arithmetic, norm, total)
        for (part, own), total in zip(_pieces(parts, reader), totals, strict=False)
    ]
    return MultiGradients(
        tuple(one.inputs[0] for one in found),
        jnp.concatenate([one.scale for one in found], axis=-1),
        jnp.concatenate([one.bias for one in found], axis=-1),
        tuple(jnp.concatenate(kernels, axis=2) for kernels in zip(*(one.kernels for one in found), strict=True)),
    )


def _part_gradients(
    x: Array,
    reader: MultiReader,
    gradients: Sequence[Array],
    groups: int,
    arithmetic: Arithmetic,
    norm: Normalization | None,
    total: Array | None,
) -> MultiGradients:
    readers = [Reader(reader.scale, reader.bias, kernel) for kernel in reader.kernels]
    assert total is None or arithmetic.library or len(readers) == 1
    if arithmetic.library or len(readers) == 1:
        found = []
        for one, gradient in zip(readers, gradients, strict=True):
            if total is not None and arithmetic.library and adds_in_place(x, total, one, groups):
                found.append(add_read_gradients(total, x, one, gradient, norm))
            else:
                own = read_gradients(x, one, gradient, groups, arithmetic, norm)
                found.append(own if total is None else own._replace(inputs=_added(total, own.inputs)))
            total = found[-1].inputs
        scale, bias = (sum(kind[1:], kind[0]) for kind in zip(*(one[1:3] for one in found), strict=True))
        return MultiGradients((found[-1].inputs,), scale, bias, tuple(one.kernel for one in found))
    # Of the kernels' input gradients the sum is masked and summed over once.
    x = normalized(x, norm)[..., : reader.scale.shape[0]]
    activation = rectify(x, reader.scale, reader.bias)
    kernels = tuple(
        read_gradients(x, one, gradient, groups, arithmetic).kernel
        for one, gradient in zip(readers, gradients, strict=True)
    )
    _, pullback = jax.vjp(lambda a: tuple(contract(a, kernel, arithmetic) for kernel in reader.kernels), activation)
    inputs, scale, bias = rectifier_gradients(pullback(tuple(gradients))[0], activation, x, reader.scale, groups)
    return MultiGradients((inputs,), scale, bias, kernels)


def _added(total: Array, gradient: Array) -> Array:
    """A gradient of the first channels added to the total."""
    width = gradient.shape[-1]
    added = (total[..., :width].astype(gradient.dtype) + gradient).astype(total.dtype)
    return added if width == total.shape[-1] else lax.dynamic_update_slice_in_dim(total, added, 0, axis=3)
