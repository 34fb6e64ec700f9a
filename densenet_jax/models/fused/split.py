"""norm_relu_conv of a feature map in several parts, with several 1x1 kernels after one scale and bias.

A product over concatenated channels is the sum of the products over the parts, so nothing has to be concatenated; and
each destination has a kernel of its own, so no output has to be split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.models.fused.backend import Backend
from densenet_jax.models.fused.norm import Normalization
from densenet_jax.models.fused.norm_relu_conv import (
    Gradients,
    NormReluConv,
    Operands,
    apply_norm,
    norm_relu,
    norm_relu_gradients,
)
from densenet_jax.models.layers import BatchStats, NormOptions


class Part(NamedTuple):
    """A feature map that is read, float[b, h, w, *], and the norm that makes x_hat of it; None: it is x_hat."""

    x: Array
    norm: Normalization | None = None

    def x_hat(self) -> Float[Array, "b h w _"]:
        """Returns x_hat of all channels."""
        return apply_norm(self.x, self.norm)


class SplitConv(NamedTuple):
    """Scale and bias float[c] before several kernels, each float[1, 1, c, o], o may differ."""

    scale: Array
    bias: Array
    kernels: tuple[Array, ...]


class SplitGradients(NamedTuple):
    """Gradients of a `SplitConv`, in float32 or wider.

    Attributes:
        x: float[b, h, w, *] of the channels read of each part.
        scale, bias: float[g, c], a row for each group of examples.
    """

    x: tuple[Array, ...]
    scale: Array
    bias: Array
    kernels: tuple[Array, ...]

    def of_parameters(self) -> SplitConv:
        """Returns the parameters' gradients, summed over groups."""
        return SplitConv(self.scale.sum(axis=0), self.bias.sum(axis=0), self.kernels)


def _split(parts: Sequence[Part], conv: SplitConv) -> Iterator[tuple[Part, SplitConv]]:
    """Yields each part with the parameters of its channels; the last part may have more channels than are read."""
    start, width = 0, conv.scale.shape[0]
    for part in parts:
        end = min(start + part.x.shape[-1], width)
        kernels = tuple(kernel[:, :, start:end] for kernel in conv.kernels)
        yield part, SplitConv(conv.scale[start:end], conv.bias[start:end], kernels)
        start = end


def _whole(part: Part, conv: SplitConv) -> Operands:
    """Returns a part's operands with one kernel, which for XLA is the one that the kernels were cut from, if it was."""
    return Operands(part.x, NormReluConv(conv.scale, conv.bias, jnp.concatenate(conv.kernels, axis=-1)), part.norm)


def split_conv(
    parts: Sequence[Part],
    conv: SplitConv,
    shifts: Sequence[Float[Array, " _"] | None],
    options: NormOptions,
    backend: Backend,
    total: Float[Array, "b h w _"] | None = None,
) -> tuple[tuple[Float[Array, "b h w _"], BatchStats | None], ...]:
    """Returns an output for each kernel, with its statistics if the backend has them.

    Args:
        shifts: for each output, near its mean, for accurate statistics; None: no statistics.
        total: added to the first output.
    """
    if len(parts) == 2 and len(conv.kernels) == 1 and total is None:
        joined = backend.joined_conv(_whole(parts[0], conv), parts[1].x_hat(), shifts[0], options)
        if joined is not None:
            return (joined,)
    if len(parts) == 1 and len(conv.kernels) == 2 and total is not None:
        forked = backend.forked_conv(total, _whole(parts[0], conv), shifts, options)
        if forked is not None:
            return forked
    pieces = list(_split(parts, conv))
    outputs = []
    for number, shift in enumerate(shifts):
        stats = None
        for part, own in pieces:
            one = NormReluConv(own.scale, own.bias, own.kernels[number])
            about = shift if part is parts[-1] else None
            total, stats = backend.norm_relu_conv_with_stats(Operands(part.x, one, part.norm), about, options, total)
        assert total is not None
        outputs.append((total, stats))
        total = None
    return tuple(outputs)


def split_conv_grads(
    parts: Sequence[Part],
    conv: SplitConv,
    gradients: Sequence[Float[Array, "b h w _"]],
    groups: int,
    backend: Backend,
    totals: Sequence[Array | None] = (None, None),
) -> SplitGradients:
    """Computes the gradients of `split_conv` and adds the parts' to totals, in place where nothing else reads those.

    Totals are for one kernel, or for backends that compute in place.
    """
    if len(parts) == 2 and len(conv.kernels) == 1 and totals[1] is not None:
        operands = _whole(parts[0], conv)
        joined = backend.accumulate_joined_grads(totals[1], operands, parts[1].x_hat(), gradients[0], groups)
        if joined is not None:
            total, one = joined
            return SplitGradients((one.x, total), one.scale, one.bias, (one.kernel,))
    if len(parts) == 1 and len(conv.kernels) == 2 and totals[0] is None:
        forked = backend.forked_conv_grads(_whole(parts[0], conv), gradients, groups)
        if forked is not None:
            width = conv.kernels[0].shape[-1]
            kernels = (forked.kernel[..., :width], forked.kernel[..., width:])
            return SplitGradients((forked.x,), forked.scale, forked.bias, kernels)
    grads = [
        _part_grads(part, own, gradients, groups, backend, total)
        for (part, own), total in zip(_split(parts, conv), totals, strict=False)
    ]
    return SplitGradients(
        tuple(one.x[0] for one in grads),
        jnp.concatenate([one.scale for one in grads], axis=-1),
        jnp.concatenate([one.bias for one in grads], axis=-1),
        tuple(jnp.concatenate(kernels, axis=2) for kernels in zip(*(one.kernels for one in grads), strict=True)),
    )


def _part_grads(
    part: Part,
    conv: SplitConv,
    gradients: Sequence[Array],
    groups: int,
    backend: Backend,
    total: Array | None,
) -> SplitGradients:
    convs = [NormReluConv(conv.scale, conv.bias, kernel) for kernel in conv.kernels]
    if backend.in_place or len(convs) == 1:
        grads: list[Gradients] = []
        for one, gradient in zip(convs, gradients, strict=True):
            operands = Operands(part.x, one, part.norm)
            if total is None:
                grads.append(backend.norm_relu_conv_grads(operands, gradient, groups))
            else:
                grads.append(backend.accumulate_grads(total, operands, gradient, groups))
            total = grads[-1].x
        scale, bias = (sum(kind[1:], kind[0]) for kind in zip(*(one[1:3] for one in grads), strict=True))
        return SplitGradients((grads[-1].x,), scale, bias, tuple(one.kernel for one in grads))
    assert total is None
    # The kernels' gradients of x are added before they are masked and summed, once.
    x = part.x_hat()[..., : conv.scale.shape[0]]
    activation = norm_relu(x, conv.scale, conv.bias)
    kernels = tuple(
        backend.norm_relu_conv_grads(Operands(x, one), gradient, groups).kernel
        for one, gradient in zip(convs, gradients, strict=True)
    )
    _, pullback = jax.vjp(lambda a: tuple(backend.convolve_same(a, kernel) for kernel in conv.kernels), activation)
    grad_x, scale, bias = norm_relu_gradients(pullback(tuple(gradients))[0], activation, x, conv.scale, groups)
    return SplitGradients((grad_x,), scale, bias, kernels)
