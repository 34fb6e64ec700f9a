"""An exponential moving average of parameters and batch statistics, evaluated beside the raw weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ema_decay(updates: Int[Array, ""] | int, decay: float, warmup: bool = True) -> Float[Array, ""]:
    """Returns the share of the average that the next update keeps.

    With `warmup` it is min(decay, (1 + t) / (10 + t)) after t updates, as in TensorFlow's ExponentialMovingAverage: the
    first values, mostly the random initial weights, are forgotten quickly.
    """
    if not warmup:
        return jnp.asarray(decay, jnp.float32)
    count = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1.0 + count) / (10.0 + count))


def update_ema(average: Any, current: Any, decay: Float[Array, ""] | float) -> Any:
    """Moves the average: decay * average + (1 - decay) * current, leaf by leaf, in the average's dtypes.

    Start with a copy of the initial {"params", "batch_stats"}: averaging both keeps the statistics in step with the
    parameters. Leaves of `current` that are not floats are copied.
    """

    def updated(old: Array, new: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        # Written so that equal values leave the average unchanged to the last bit.
        step = (1.0 - jnp.asarray(decay)).astype(jnp.promote_types(old.dtype, jnp.float32))
        return (old + step * (new - old)).astype(old.dtype)

    return jax.tree.map(updated, average, current)
