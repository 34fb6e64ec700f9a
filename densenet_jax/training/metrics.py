"""Metrics as sums and counts, exact when merged over batches, devices and processes; divided only when printed."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def class_ranks(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Int[Array, " b"]:
    """Counts the classes ranked before the true one: 0 if the prediction is right.

    Ties go by class number, as in `jnp.argmax` and `jax.lax.top_k`. A row with a NaN predicts nothing: its rank is k.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])[None, :]
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    ranks = jnp.sum(before, axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), logits.shape[-1], ranks)


def best_of_set(logits: Float[Array, "b k"], right: Bool[Array, "b k"]) -> Int[Array, " b"]:
    """Returns the right class with the largest logit; meaningless for a row without a right class."""
    return jnp.argmax(jnp.where(right, logits, -jnp.inf), axis=-1)


@flax.struct.dataclass
class ClassificationSums:
    """Loss and correct predictions summed over examples; counts are int32."""

    loss: Float[Array | np.ndarray, ""]
    top1: Int[Array | np.ndarray, ""]
    top5: Int[Array | np.ndarray, ""]
    examples: Int[Array | np.ndarray, ""]

    @classmethod
    def zeros(cls) -> "ClassificationSums":
        """Returns the sums over no examples."""
        nothing = jnp.zeros((), jnp.int32)
        return cls(loss=jnp.zeros((), jnp.float32), top1=nothing, top5=nothing, examples=nothing)

    @classmethod
    def from_batch(
        cls,
        logits: Float[Array, "b k"],
        labels: Int[Array, " b"] | Float[Array, "b k"],
        losses: Float[Array, " b"],
        mask: Bool[Array, " b"] | None = None,
    ) -> "ClassificationSums":
        """Sums over one batch; top-5 of fewer than five classes is 1.0.

        Args:
            labels: class numbers, or class probabilities of mixed examples. An answer is then right if it is the class
                with the largest share (the lower number of two equal ones), so accuracy is low by nature and not
                comparable with validation.
            losses: one per example, from `cross_entropy`.
            mask: False for padding, which counts nowhere, not even with a NaN; None counts every example.
        """
        if labels.ndim == 2:
            labels = jnp.argmax(labels, axis=-1)
        counted = jnp.ones(losses.shape, bool) if mask is None else mask
        ranks = class_ranks(logits, labels)
        best = min(5, logits.shape[-1])
        return cls(
            loss=jnp.sum(jnp.where(counted, losses, 0.0)),
            top1=jnp.sum((ranks < 1) & counted, dtype=jnp.int32),
            top5=jnp.sum((ranks < best) & counted, dtype=jnp.int32),
            examples=jnp.sum(counted, dtype=jnp.int32),
        )

    def merge(self, other: "ClassificationSums") -> "ClassificationSums":
        """Adds the sums over other examples."""
        return jax.tree.map(jnp.add, self, other)

    def compute(self) -> dict[str, float]:
        """Computes means on the host: "loss", "top1", "top5" (fractions) and "examples" (a count).

        Raises:
            ValueError: there is no example to average over.
        """
        examples = int(self.examples)
        if examples == 0:
            raise ValueError("no example was counted, so there is no mean")
        return {
            "loss": float(self.loss) / examples,
            "top1": int(self.top1) / examples,
            "top5": int(self.top5) / examples,
            "examples": examples,
        }


@flax.struct.dataclass
class LabelSums:
    """Loss and decisions of many labels an image, summed over their known labels; counts are int32.

    A label is predicted from a probability of one half on.
    """

    loss: Float[Array | np.ndarray, ""]
    examples: Int[Array | np.ndarray, ""]
    known: Int[Array | np.ndarray, " k"]
    present: Int[Array | np.ndarray, " k"]
    predicted: Int[Array | np.ndarray, " k"]
    both: Int[Array | np.ndarray, " k"]  # present and predicted

    @classmethod
    def zeros(cls, num_labels: int) -> "LabelSums":
        """Returns the sums over no examples."""
        nothing = jnp.zeros((num_labels,), jnp.int32)
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), nothing, nothing, nothing, nothing)

    @classmethod
    def from_batch(
        cls,
        logits: Float[Array, "b k"],
        targets: Float[Array, "b k"],
        losses: Float[Array, " b"],
        mask: Bool[Array, " b"] | None = None,
    ) -> "LabelSums":
        """Sums over one batch.

        Args:
            targets: 1 or 0, NaN for unknown; a mixed label is present from one half on.
            losses: one per example, over its known labels.
            mask: False for padding, which counts nowhere, not even with a NaN; None counts every example.
        """
        counted = jnp.ones(losses.shape, bool) if mask is None else mask
        known = ~jnp.isnan(targets) & counted[:, None]
        present, predicted = known & (targets >= 0.5), known & (logits >= 0)
        return cls(
            jnp.sum(jnp.where(counted, losses, 0.0)),
            jnp.sum(counted, dtype=jnp.int32),
            *(jnp.sum(each, axis=0, dtype=jnp.int32) for each in (known, present, predicted, present & predicted)),
        )

    def merge(self, other: "LabelSums") -> "LabelSums":
        """Adds the sums over other examples."""
        return jax.tree.map(jnp.add, self, other)

    def compute(self) -> dict[str, float]:
        """Computes on the host "loss", the mean over all known labels, "f1" and "examples" (a count).

        F1 is the mean over the labels that were seen present and absent, NaN if there is none.

        Raises:
            ValueError: there is no example to average over.
        """
        if not int(self.examples):
            raise ValueError("no example was counted, so there is no mean")
        known, present, predicted, both = (
            np.asarray(each, np.float64) for each in (self.known, self.present, self.predicted, self.both)
        )
        judged = (present > 0) & (present < known)
        f1 = 2 * both[judged] / (present + predicted)[judged]
        return {
            "loss": float(self.loss) / max(float(known.sum()), 1.0),
            "f1": float(f1.mean()) if len(f1) else float("nan"),
            "examples": int(self.examples),
        }


def confusion_counts(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], mask: Bool[Array, " b"] | None = None
) -> Int[Array, "k k"]:
    """Counts examples of each true class (rows) by predicted class (columns); counts of batches add up.

    The prediction is the first of the largest logits; examples whose `mask` is False are padding and not counted.
    """
    num_classes = logits.shape[-1]
    weights = jnp.ones(labels.shape, jnp.int32) if mask is None else mask.astype(jnp.int32)
    counts = jnp.zeros((num_classes, num_classes), jnp.int32)
    return counts.at[labels, jnp.argmax(logits, axis=-1)].add(weights)
