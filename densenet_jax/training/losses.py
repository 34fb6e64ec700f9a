"""Classification losses: one value per example, in float32 or better."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"] | Float[Array, "b k"],
    label_smoothing: float = 0.0,
) -> Float[Array, " b"]:
    """Softmax cross entropy in nats, per example; computed in float32, or in float64 where the logits are.

    Args:
        labels: class numbers in [0, k), or the probability of each class (mixed examples), each row summing to 1.
        label_smoothing: share eps in [0, 1) of the target that is spread evenly over all k classes, eps/k each, the
            true one included (arXiv:1512.00567 as torch computes it; not eps/(k-1)).
    """
    num_classes = logits.shape[-1]
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    if labels.ndim == 1:
        # A class number outside the range gives NaN here, which stops the run, rather than a quiet zero.
        labels = jnp.where(labels < 0, num_classes, labels)
        own = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1, mode="fill")[:, 0]
    else:
        own = jnp.sum(labels.astype(log_probabilities.dtype) * log_probabilities, axis=-1)
    if label_smoothing == 0.0:
        return -own
    return -(1.0 - label_smoothing) * own - label_smoothing * jnp.mean(log_probabilities, axis=-1)


def label_set_cross_entropy(logits: Float[Array, "b k"], right: Bool[Array, "b k"]) -> Float[Array, " b"]:
    """Cross entropy of the total probability of all right classes, in nats, per example.

    `right` is True for every right class; with one it is `cross_entropy`, with none it is infinity.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return -jax.nn.logsumexp(log_probabilities, axis=-1, where=right)
