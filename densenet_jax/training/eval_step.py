"""The evaluation and prediction steps: pure functions of weights and a batch; sums add up over batches."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from densenet_jax.dtypes import wide
from densenet_jax.training.losses import SigmoidLoss, cross_entropy, label_set_cross_entropy
from densenet_jax.training.metrics import ClassificationSums, LabelSums, best_of_set, confusion_counts

Batch = dict[str, Array]
Normalize = Callable[[UInt[Array, "b h w c"]], Float[Array, "b h w c"]]
PredictStep = Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]  # jitted: (variables, batch)
Evaluated = Any  # a network, or what applies variables as one does (`models.fused.inference.PackedInCall`)


@flax.struct.dataclass
class EvalSums:
    """Counts over examples.

    Attributes:
        sums: over the examples that have a right class.
        seen: all examples that are not padding, with or without a right class.
        confusion: examples of each true class (rows) by predicted class (columns); None unless requested.
        rows: of many labels, a batch's examples in order: "logit" and "label" float32 [b, k], "mask" bool [b]. None of
            one class an image, and once merged; `densenet_jax.run.evaluate` collects them.
    """

    sums: ClassificationSums | LabelSums
    seen: Int[Array | np.ndarray, ""]
    confusion: Int[Array | np.ndarray, "k k"] | None = None
    rows: dict[str, Array | np.ndarray] | None = None

    def merge(self, other: "EvalSums") -> "EvalSums":
        """Adds the counts of other examples."""
        return jax.tree.map(jnp.add, self.replace(rows=None), other.replace(rows=None))  # type: ignore[attr-defined]


def make_eval_step(
    model: Evaluated, normalize: Normalize, *, classes: Sequence[int] | None = None, confusion: bool = False
) -> Callable[[dict[str, Any], Batch], EvalSums]:
    """Builds `step(variables, batch) -> sums` over the examples that the batch's mask names.

    The batch has "image" uint8 [b, h, w, c], or [b, crops, h, w, c] for evaluation by crops and their mirror images
    (`mean_logits`), "label" int32 [b] and "mask" bool [b], False for padding. With "label_set" bool [b, k] an answer is
    right if it is any of the set (ImageNet ReaL, arXiv:2006.07159); an example with an empty set is seen, but left out
    of the sums. `confusion`, not for label sets, counts predictions by true class. `classes`, if given, are the only
    class numbers that can be predicted.

    With many labels an image "label" is float32 [b, k], 1, 0 or NaN for unknown; the loss is then the binary cross
    entropy of the known labels, whatever the training loss, and the batch's examples are in `EvalSums.rows`.
    """

    def eval_step(variables: dict[str, Any], batch: Batch) -> EvalSums:
        logits = batch_logits(model, normalize, variables, batch["image"], classes)
        mask: Bool[Array, " b"] = batch["mask"]
        labels, counted = batch["label"], mask
        if labels.ndim == 2:
            logits = logits.astype(wide(logits.dtype))
            losses = SigmoidLoss()(logits, labels)
            return EvalSums(
                sums=LabelSums.from_batch(logits, labels, losses, mask),
                seen=jnp.sum(mask, dtype=jnp.int32),
                rows={"logit": logits, "label": labels, "mask": mask},
            )
        if "label_set" in batch:
            right: Bool[Array, "b k"] = batch["label_set"]
            labels, counted = best_of_set(logits, right), mask & jnp.any(right, axis=-1)
            losses = label_set_cross_entropy(logits, right)
        else:
            losses = cross_entropy(logits, labels)
        return EvalSums(
            sums=ClassificationSums.from_batch(logits, labels, losses, counted),
            seen=jnp.sum(mask, dtype=jnp.int32),
            confusion=confusion_counts(logits, labels, counted) if confusion else None,
        )

    return eval_step


def make_predict_step(
    model: Evaluated, normalize: Normalize, *, classes: Sequence[int] | None = None, many_labels: bool = False
) -> Callable[[dict[str, Any], Batch], Batch]:
    """Builds `step(variables, batch) -> answers`, with the same logits as `make_eval_step` for the same arguments.

    The answers are "probability" float32 [b, k] and everything in the batch but its images. With `many_labels` each
    label has a probability of its own.
    """
    to_probabilities = jax.nn.sigmoid if many_labels else jax.nn.softmax

    def predict_step(variables: dict[str, Any], batch: Batch) -> Batch:
        logits = batch_logits(model, normalize, variables, batch["image"], classes)
        rest = {name: array for name, array in batch.items() if name != "image"}
        return {**rest, "probability": to_probabilities(logits.astype(jnp.float32))}

    return predict_step


def make_logits_step(
    model: Evaluated, normalize: Normalize, *, classes: Sequence[int] | None = None
) -> Callable[[dict[str, Any], Batch], Batch]:
    """Builds `step(variables, batch) -> rows`: "logit" [b, k] in float32 or better, "label" and "mask"."""

    def logits_step(variables: dict[str, Any], batch: Batch) -> Batch:
        logits = batch_logits(model, normalize, variables, batch["image"], classes)
        return {"logit": logits.astype(wide(logits.dtype)), "label": batch["label"], "mask": batch["mask"]}

    return logits_step


def batch_logits(
    model: Evaluated,
    normalize: Normalize,
    variables: dict[str, Any],
    images: UInt[Array, "b h w c"] | UInt[Array, "b n h w c"],
    classes: Sequence[int] | None,
) -> Float[Array, "b k"]:
    """Computes the logits of whole images, or their mean over crops, restricted to `classes` if given."""

    def logits_of(images: UInt[Array, "b h w c"]) -> Float[Array, "b k"]:
        return model.apply(variables, normalize(images), train=False)

    logits = logits_of(images) if images.ndim == 4 else mean_logits(logits_of, images)
    return logits if classes is None else restrict(logits, classes)


def mean_logits(
    logits_of: Callable[[UInt[Array, "b h w c"]], Float[Array, "b k"]], images: UInt[Array, "b n h w c"]
) -> Float[Array, "b k"]:
    """Averages the logits of n crops of each image and of their mirror images; five crops give ten-crop evaluation.

    Logits rather than probabilities, as in fb.resnet.torch, from which the DenseNet paper's code derives. One crop of
    the whole batch follows the other, so memory is that of single-crop evaluation.
    """
    count = images.shape[1]

    def one(number: Int[Array, ""]) -> Float[Array, "b k"]:
        crop = jnp.take(images, number % count, axis=1)
        logits = logits_of(jnp.where(number < count, crop, crop[:, :, ::-1]))
        return logits.astype(wide(logits.dtype))

    return jnp.mean(jax.lax.map(one, jnp.arange(2 * count)), axis=0)


def restrict(logits: Float[Array, "b k"], classes: Sequence[int]) -> Float[Array, "b k"]:
    """Sets the logits of all other classes to minus infinity, so that none has a probability or is predicted."""
    allowed = np.zeros((1, logits.shape[-1]), bool)
    allowed[0, list(classes)] = True
    return jnp.where(allowed, logits, -jnp.inf)
