"""Losses of classification, one value an example, in float32 or better."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"] | Float[Array, "b k"],
    label_smoothing: float = 0.0,
) -> Float[Array, " b"]:
    """Softmax cross entropy of each example.

    Args:
        logits: any float dtype; computed in float32, or in float64 where the logits are.
        labels: class numbers in [0, k), or the probability of each class (mixed examples), each row summing to 1.
        label_smoothing: share eps in [0, 1) of the target that is spread evenly over all k classes, eps/k each, the
            true one included (arXiv:1512.00567, torch's form; not eps/(k-1)).

    Returns:
        One loss an example, in nats.
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
    """Cross entropy with the probability of all right classes together.

    Args:
        logits: any float dtype; computed in float32, or in float64 where the logits are.
        right: True for every right class of an example; with one it is `cross_entropy`.

    Returns:
        One loss an example, in nats; infinity for an example without a right class.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return -jax.nn.logsumexp(log_probabilities, axis=-1, where=right)
