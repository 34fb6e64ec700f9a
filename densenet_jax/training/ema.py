"""An exponential moving average of parameters and batch statistics, evaluated beside the raw weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from densenet_jax.dtypes import wide


def ema_decay(updates: Int[Array, ""] | int, decay: float) -> Float[Array, ""]:
    """Returns the share of the average that the next update keeps.

    It is min(decay, (1 + t) / (10 + t)) after t updates, as in TensorFlow's ExponentialMovingAverage: the first values,
    mostly the random initial weights, are forgotten quickly.
    """
    count = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1.0 + count) / (10.0 + count))


def update_ema(average: Any, current: Any, decay: Float[Array, ""] | float) -> Any:
    """Moves the average: decay * average + (1 - decay) * current, leaf by leaf, in the average's dtypes.

    Start with a copy of the initial {"params", "batch_stats"}: averaging both keeps the statistics in step with the
    parameters.
    """

    def updated(old: Array, new: Array) -> Array:
        # Written so that equal values leave the average unchanged to the last bit.
        step = (1.0 - jnp.asarray(decay)).astype(wide(old.dtype))
        return (old + step * (new - old)).astype(old.dtype)

    return jax.tree.map(updated, average, current)
