"""Computes a large batch as several small ones: the same mean gradient with a fraction of the memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

# (parameters, batch statistics, microbatch, its number) -> (gradients of its mean loss, new statistics, outputs that
# have an example axis first)
GradientFunction = Callable[[Any, Any, Any, Int[Array, ""]], tuple[Any, Any, Any]]


def split_batch(array: Shaped[Array, "b ..."], count: int) -> Shaped[Array, "{count} m ..."]:
    """Splits [b, ...] into [count, b / count, ...]: microbatch j holds the examples whose number is j modulo count.

    A batch split over devices in contiguous parts then gives each device its share of every microbatch in place.
    """
    dealt = array.reshape(array.shape[0] // count, count, *array.shape[1:])
    return jnp.swapaxes(dealt, 0, 1)


def join_batch(array: Shaped[Array, "n m ..."]) -> Shaped[Array, "b ..."]:
    """Inverts `split_batch`."""
    return jnp.swapaxes(array, 0, 1).reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def accumulate_gradients(
    gradient_function: GradientFunction, params: Any, batch_stats: Any, batch: Any, count: int
) -> tuple[Any, Any, Any]:
    """Computes gradients of the mean loss over the whole batch, in `count` microbatches one after the other.

    Equal to the large batch up to rounding, with one difference: batch norm normalizes each microbatch by its own
    statistics (as `model.batch_norm_group_size` of b / count does within one large batch) and moves its running
    statistics `count` times a step, each time by the usual share.

    Args:
        gradient_function: called once a microbatch; see `GradientFunction`. It must not see the running statistics
            in its loss, as batch norm in training doesn't. Dropout keys should depend on the microbatch's number.
        batch: a tree of arrays [b, ...]; `count` divides b.

    Returns:
        Gradients, batch statistics after the last microbatch, and the outputs as [b, ...] in the batch's order.
    """
    if count == 1:
        return gradient_function(params, batch_stats, batch, jnp.zeros((), jnp.int32))

    def one(carry: tuple[Any, Any], scanned: tuple[Any, Array]) -> tuple[tuple[Any, Any], Any]:
        total, statistics = carry
        microbatch, number = scanned
        gradients, statistics, outputs = gradient_function(params, statistics, microbatch, number)
        return (jax.tree.map(jnp.add, total, gradients), statistics), outputs

    zeros = jax.tree.map(jnp.zeros_like, params)
    microbatches = jax.tree.map(lambda array: split_batch(array, count), batch)
    numbers = jnp.arange(count, dtype=jnp.int32)
    (total, batch_stats), outputs = jax.lax.scan(one, (zeros, batch_stats), (microbatches, numbers))
    gradients = jax.tree.map(lambda leaf: leaf / count, total)
    return gradients, batch_stats, jax.tree.map(join_batch, outputs)
