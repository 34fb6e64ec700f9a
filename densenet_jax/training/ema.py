"""An exponential moving average of parameters and batch statistics, evaluated beside the raw weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ema_decay(updates: Int[Array, ""] | int, decay: float, warmup: bool = True) -> Float[Array, ""]:
    """The share of the average that the next update keeps.

    Args:
        updates: updates of the average so far, t.
        decay: the share in the long run, in [0, 1).
        warmup: min(decay, (1 + t) / (10 + t)), TensorFlow's ExponentialMovingAverage: the first values, which are
            mostly the random initial weights, are forgotten quickly.
    """
    if not warmup:
        return jnp.asarray(decay, jnp.float32)
    count = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1.0 + count) / (10.0 + count))


def update_ema(average: Any, current: Any, decay: Float[Array, ""] | float) -> Any:
    """Moves the average: decay * average + (1 - decay) * current, leaf by leaf.

    Args:
        average: any tree of arrays; start with a copy of the initial {"params", "batch_stats"}. Averaging the batch
            statistics with the parameters keeps the two in step, which a raw copy of either would not.
        current: the same tree after a training step. Leaves that are not floats are copied.
        decay: kept share, from `ema_decay`.

    Returns:
        The new average, in the average's dtypes.
    """

    def updated(old: Array, new: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        # Written so that equal values leave the average unchanged to the last bit.
        step = (1.0 - jnp.asarray(decay)).astype(jnp.promote_types(old.dtype, jnp.float32))
        return (old + step * (new - old)).astype(old.dtype)

    return jax.tree.map(updated, average, current)
