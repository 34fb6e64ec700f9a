"""Exact figures over a whole split: every example counts once, whatever the batch size."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from densenet_jax.progress import Bar
from densenet_jax.training.metrics import ClassificationSums
from densenet_jax.training.sharding import to_devices


def evaluate(
    eval_step: Callable[[dict[str, Any], dict[str, jax.Array]], ClassificationSums],
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    examples: int,
    batch_count: int,
) -> dict[str, float]:
    """Sums over all `batches` and divides once at the end.

    Args:
        eval_step: as `densenet_jax.training.steps.make_eval_step` builds it, jitted.
        variables: {"params", "batch_stats"}.
        batches: this process's shares of padded and masked global batches.
        mesh: where they go.
        examples: how many examples the split has; the count is checked against it.
        batch_count: how many batches there are, for the bar.

    Returns:
        {"examples", "loss", "top1", "top5"}; the last three are means, the accuracies in [0, 1].

    Raises:
        RuntimeError: another number of examples was counted than the split has.
    """
    bar = Bar("evaluating", batch_count)
    total = ClassificationSums.zeros()
    try:
        for batch in batches:
            before, total = total, total.merge(eval_step(variables, to_devices(batch, mesh)))
            jax.block_until_ready(before)  # one batch in flight, one on its way: memory stays bounded
            bar.advance()
        total = jax.device_get(total)
    finally:
        bar.close()
    if int(total.examples) != examples:
        raise RuntimeError(f"counted {int(total.examples)} examples of a split that has {examples}")
    figures = total.compute()
    return {name: figures[name] for name in ("examples", "loss", "top1", "top5")}
