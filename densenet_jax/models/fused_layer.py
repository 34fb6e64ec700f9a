"""The backward pass of a dense layer with a bottleneck by the TPU's kernels, each of its maps read once.

Over a mesh each device takes its own examples, and what is summed over the batch is added up over the devices.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.kernels.shard import on_each_device
from densenet_jax.kernels.tpu.conv_gradients import conv_gradients, conv_gradients_kernel
from densenet_jax.kernels.tpu.reader_gradients import reader_gradients, reader_gradients_kernel
from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.normalization import Normalization
from densenet_jax.models.readers import Reader, ReaderGradients, sums_by_reader


def layer_gradients(
    total: Float[Array, "b h w c2"],
    maps: Float[Array, "b h w c2"],
    hidden: Float[Array, "b h w o"],
    readers: tuple[Reader, Reader],
    of_raw: Float[Array, "g 3 k"],
    norm: Normalization,
    arithmetic: Arithmetic,
) -> tuple[ReaderGradients, ReaderGradients]:
    """The gradients of a layer's two readers, the first one's inputs those of all readers so far, this one's added.

    Args:
      total: the gradient of the block's x^ by all readers so far.
      maps: the block's x^.
      hidden: what the layer's first convolution gave.
      readers: the layer's two.
      of_raw: `Normalization.factors` of what the layer made, behind the columns that it read.
      norm: of hidden.
      arithmetic: how.
    """
    (first, second), (start, groups) = readers, (readers[0].scale.shape[0], of_raw.shape[0])
    convolve, read = functools.partial(conv_gradients, start=start), reader_gradients
    if arithmetic.layer_gradients == "interpret":
        convolve = functools.partial(conv_gradients_kernel, start=start, interpret=True)
        read = functools.partial(reader_gradients_kernel, interpret=True)
    mean, reciprocal = norm.mean_and_reciprocal()
    is_divided, results = groups > 1, ("example", "group", "group", "whole")
    opened, *of_second = on_each_device(
        lambda *operands, groups: convolve(*operands),
        arithmetic.mesh,
        groups,
        (True, True, is_divided, True, is_divided, is_divided, False, False, False),
        results,
    )(total, maps, of_raw, hidden, mean, reciprocal, *second)
    found = ReaderGradients(opened, *of_second)
    count = hidden.size // hidden.shape[-1] // groups
    sums = sums_by_reader(second.scale, found.scale, found.bias)
    of_normalized, of_x, constant = norm.factors(sums, count).swapaxes(0, 1)
    of_hidden = of_x * reciprocal
    factors = (of_normalized * second.scale.astype(mean.dtype)[None, :], of_hidden, constant - of_hidden * mean)
    total, of_scale, of_bias, of_kernel = on_each_device(
        lambda *operands, groups: read(*operands),
        arithmetic.mesh,
        groups,
        (True, True, False, False, False, True, is_divided),
        results,
    )(total, maps, first.scale, first.bias, first.kernel[0, 0], opened, jnp.stack(factors, axis=1))
    return ReaderGradients(total, of_scale, of_bias, of_kernel[None, None]), found
