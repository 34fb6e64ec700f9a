"""Losses: one value per example, in float32 or better, and what their sum over a batch is divided by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from densenet_jax.choices import LOSSES
from densenet_jax.dtypes import wide
from densenet_jax.training.metrics import ClassificationSums, LabelSums


def cross_entropy(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"] | Float[Array, "b k"],
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
) -> Float[Array, " b"]:
    """Softmax cross entropy in nats, per example; computed in float32, or in float64 where the logits are.

    Args:
        labels: class numbers in [0, k), or the probability of each class (mixed examples), each row summing to 1.
        label_smoothing: share eps in [0, 1) of the target that is spread evenly over all k classes, eps/k each, the
            true one included (arXiv:1512.00567 as torch computes it; not eps/(k-1)).
        class_weights: factor of each class's term; () is 1.
    """
    num_classes = logits.shape[-1]
    log_probabilities = jax.nn.log_softmax(logits.astype(wide(logits.dtype)))
    if class_weights:
        log_probabilities = log_probabilities * jnp.asarray([class_weights], log_probabilities.dtype)
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
    log_probabilities = jax.nn.log_softmax(logits.astype(wide(logits.dtype)))
    return -jax.nn.logsumexp(log_probabilities, axis=-1, where=right)


@dataclasses.dataclass(frozen=True)
class SoftmaxLoss:
    """Cross entropy of one class an image, as a mean over the batch.

    With class weights w it is torch's `CrossEntropyLoss(weight=w)`: sum_ik w_k * q_ik * -log p_ik over sum_i w of the
    image's class, with the smoothed target q; for a mixture, the mixed weight.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()  # one a class; (): all the same

    def __call__(self, logits: Float[Array, "b k"], targets: Array) -> Float[Array, " b"]:
        """Computes one value per example."""
        return cross_entropy(logits, targets, self.label_smoothing, self.class_weights)

    def divisor(self, targets: Array) -> Float[Array, ""] | None:
        """Returns what the sum over a batch is divided by, the batch's weight; None is the number of examples."""
        if not self.class_weights:
            return None
        weights = jnp.asarray(self.class_weights, jnp.float32)
        return jnp.sum(weights[targets] if targets.ndim == 1 else targets @ weights)

    def sums(self, logits: Float[Array, "b k"], targets: Array, losses: Float[Array, " b"]) -> ClassificationSums:
        """Sums up a batch so that its "loss" is the mean that was minimized."""
        divisor = self.divisor(targets)
        if divisor is not None:
            losses = losses * (losses.shape[0] / divisor)
        return ClassificationSums.from_batch(logits, targets, losses)


@dataclasses.dataclass(frozen=True)
class BinaryLoss(SoftmaxLoss):
    """Binary cross entropy of every class of one class an image, as a mean over classes and batch.

    The target is one-hot, smoothed or mixed, as of timm's --bce-loss (arXiv:2110.00476): (1 - eps) * q + eps / k. Class
    weights are factors of the classes' terms, as torch's `BCEWithLogitsLoss(weight=w)` has them.
    """

    def __call__(self, logits: Float[Array, "b k"], targets: Array) -> Float[Array, " b"]:
        """Computes one value per example; NaN for a class number outside the range."""
        logits = logits.astype(wide(logits.dtype))
        classes = jnp.arange(logits.shape[-1])[None]
        if targets.ndim == 1:
            known = (targets >= 0) & (targets < logits.shape[-1])
            targets = jnp.where(known[:, None], targets[:, None] == classes, jnp.nan)
        targets = targets.astype(logits.dtype) * (1.0 - self.label_smoothing) + self.label_smoothing / classes.size
        terms = -targets * jax.nn.log_sigmoid(logits) - (1.0 - targets) * jax.nn.log_sigmoid(-logits)
        if self.class_weights:
            terms = terms * jnp.asarray([self.class_weights], terms.dtype)
        return jnp.mean(terms, axis=-1)

    def divisor(self, targets: Array) -> None:
        """Returns None: the sum over a batch is divided by the number of examples."""
        del targets


@dataclasses.dataclass(frozen=True)
class SigmoidLoss:
    """Binary cross entropy of many labels an image, as a mean over the known labels of the batch.

    With p = sigmoid(logit) and a target y in [0, 1], NaN for unknown, one label gives

        -(w * y * (1 - p)^a * log p  +  (1 - y) * q^b * log(1 - q)),  q = max(p - margin, 0)

    where (a, b) are `gammas`: (0, 0) without a margin is binary cross entropy, (2, 2) focal loss (arXiv:1708.02002)
    and (0, 4) with a margin of 0.05 asymmetric loss (arXiv:2009.14119, equations 4 to 7).

    Attributes:
        label_smoothing: moves y toward one half: y * (1 - eps) + eps / 2.
        class_weights: w, the weight of each label's positives, as torch's `pos_weight`; (): 1.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    gammas: tuple[float, float] = (0.0, 0.0)
    margin: float = 0.0

    def __call__(self, logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, " b"]:
        """Sums over the known labels of each example."""
        return jnp.sum(self.elements(logits, targets), axis=-1)

    def elements(self, logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, "b k"]:
        """Computes one value per label, 0 where it is unknown; in float32, or in float64 where the logits are."""
        logits = logits.astype(wide(logits.dtype))
        known = ~jnp.isnan(targets)
        targets = jnp.where(known, targets, 0.0).astype(logits.dtype)
        if self.label_smoothing:
            targets = targets * (1.0 - self.label_smoothing) + self.label_smoothing / 2.0
        log_p, log_rest = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        positive, log_shifted, log_kept = log_p, log_p, log_rest
        if self.margin:
            probability = jnp.exp(log_p)
            above = probability > self.margin
            # Below the margin there is neither loss nor gradient; the constant keeps NaN out of the unused branch.
            shifted = jnp.where(above, probability - self.margin, 0.5)
            log_shifted = jnp.log(shifted)
            log_kept = jnp.where(above, jnp.log1p(-shifted), 0.0)
        negative = log_kept
        first, second = self.gammas
        if first:
            positive = positive * jnp.exp(first * log_rest)
        if second:
            negative = negative * jnp.exp(second * log_shifted)
        if self.class_weights:
            positive = positive * jnp.asarray([self.class_weights], logits.dtype)
        return jnp.where(known, -(targets * positive + (1.0 - targets) * negative), 0.0)

    def divisor(self, targets: Float[Array, "b k"]) -> Float[Array, ""]:
        """Returns what the sum over a batch is divided by: the number of known labels, at least 1."""
        return jnp.maximum(jnp.sum(~jnp.isnan(targets), dtype=jnp.float32), 1.0)

    def sums(self, logits: Float[Array, "b k"], targets: Float[Array, "b k"], losses: Array) -> LabelSums:
        """Sums up a batch; a mixed label counts as present from one half on."""
        return LabelSums.from_batch(logits, targets, losses)


Loss = SoftmaxLoss | SigmoidLoss
SOFTMAX = SoftmaxLoss()


def make_loss(
    name: str,
    *,
    gammas: tuple[float, ...] = (),
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
) -> Loss:
    """Makes the loss of one of the `LOSSES`; `gammas` and `margin` change only those that have them."""
    kind = LOSSES[name]
    if kind.labels == "single":
        return (BinaryLoss if name == "binary" else SoftmaxLoss)(label_smoothing, class_weights)
    first, second = gammas if gammas and any(kind.gammas) else kind.gammas
    return SigmoidLoss(label_smoothing, class_weights, (first, second), margin if kind.has_margin else 0.0)


def balanced_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Computes weights that let every class, or the two sides of every label, count equally.

    Args:
        labels: int [n] class numbers, which give n / (classes with images * images of the class), or float [n, k] with
            NaN for unknown, which give negatives / positives. A class or label with only one kind of example gets 1.
    """
    if labels.ndim == 2:
        positive, negative = np.sum(labels == 1, axis=0), np.sum(labels == 0, axis=0)
        return _ratios(negative, positive)
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    return _ratios(np.where(counts > 0, counts.sum() / max(np.count_nonzero(counts), 1), 0), counts)


def _ratios(above: np.ndarray, below: np.ndarray) -> tuple[float, ...]:
    usable = (above > 0) & (below > 0)
    return tuple(np.where(usable, above / np.maximum(below, 1), 1.0).tolist())
