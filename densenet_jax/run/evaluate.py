"""Exact figures over a whole split: every example counts once, whatever the batch size."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from densenet_jax.scores.classes import ClassScores
from densenet_jax.scores.labels import score_labels
from densenet_jax.system.console import Bar
from densenet_jax.training.eval_step import EvalSums, PredictStep
from densenet_jax.training.sharding import to_devices


def evaluate(
    eval_step: Callable[[dict[str, Any], dict[str, jax.Array]], EvalSums],
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    examples: int,
    batch_count: int,
) -> EvalSums:
    """Evaluates all `batches` and returns the counts over the whole split, on the host, the same on all processes.

    With many labels the counts' `rows` are all examples in the order of the split, without padding.

    Args:
        eval_step: as `densenet_jax.training.eval_step.make_eval_step` builds it, jitted.
        batches: this process's shares of padded and masked global batches.
        examples: size of the split, which the count is checked against.

    Raises:
        RuntimeError: another number of examples was seen than the split has.
    """
    total: EvalSums | None = None
    waiting: dict[str, Any] | None = None
    rows: list[dict[str, np.ndarray]] = []
    with contextlib.closing(Bar("evaluating", batch_count)) as bar:
        for batch in batches:
            part = eval_step(variables, to_devices(batch, mesh))
            before, total = total, part if total is None else total.merge(part)
            jax.block_until_ready(before)  # at most two batches on the device: memory stays bounded
            if waiting is not None:
                rows.append(_unpadded(waiting))
            waiting = part.rows
            bar.advance()
    counts: EvalSums | None = jax.device_get(total)
    if counts is not None and waiting is not None:
        rows.append(_unpadded(waiting))
        counts = counts.replace(rows=_join(rows))  # type: ignore[attr-defined]
    seen = 0 if counts is None else int(counts.seen)
    if counts is None or seen != examples:
        raise RuntimeError(f"counted {seen} examples of a split that has {examples}")
    return counts


def predict_batches(
    step: PredictStep,
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    batch_count: int,
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Yields each batch, this process's share, with the outputs for the whole global batch, on the host.

    `step` is jitted with replicated outputs.
    """
    with contextlib.closing(Bar("predicting", batch_count)) as bar:
        for batch in batches:
            yield batch, jax.device_get(step(variables, to_devices(batch, mesh)))
            bar.advance()


def gather_rows(
    step: PredictStep,
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    examples: int,
    batch_count: int,
) -> dict[str, np.ndarray]:
    """Returns the rows of every example in the order of the split, without padding, the same on all processes.

    `step` is as `densenet_jax.training.eval_step.make_logits_step` builds it, jitted with replicated outputs.

    Raises:
        RuntimeError: another number of examples was seen than the split has.
    """
    predictions = predict_batches(step, variables, batches, mesh, batch_count)
    joined = _join([_unpadded(outputs) for _, outputs in predictions])
    if len(joined["label"]) != examples:
        raise RuntimeError(f"counted {len(joined['label'])} examples of a split that has {examples}")
    return joined


def _unpadded(rows: dict[str, Any]) -> dict[str, np.ndarray]:
    """Fetches a batch's rows, which every process has whole, without padding."""
    fetched = jax.device_get(rows)
    mask = fetched.pop("mask")
    return {name: array[mask] for name, array in fetched.items()}


def _join(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}


def figures_of(counts: EvalSums) -> dict[str, float]:
    """Computes {"examples", "loss", "top1", "top5"}: means except the first, accuracies in [0, 1].

    "examples" leaves out images without a right class. With many labels they are {"examples", "loss", "auroc",
    "average_precision", "f1", "labels"}: the loss over all known labels, the scores as means over the labels that have
    both kinds of examples, NaN if there is none, and the number of those.
    """
    figures = counts.sums.compute()
    if counts.rows is not None:
        scores = score_labels(np.asarray(counts.rows["logit"]), np.asarray(counts.rows["label"]))
        means = {name: scores.means()[name] for name in ("auroc", "average_precision", "f1")}
        first = {name: figures[name] for name in ("examples", "loss")}
        return {**first, **means, "labels": int(np.count_nonzero(scores.is_scored))}
    return {name: figures[name] for name in ("examples", "loss", "top1", "top5")}


def figures_by_class(counts: EvalSums) -> dict[str, float]:
    """Computes {"balanced_accuracy", "f1"}, means over classes, from counts with a confusion matrix."""
    means = ClassScores.from_confusion(np.asarray(counts.confusion)).means()
    return {name: float(means[name]) for name in ("balanced_accuracy", "f1")}
