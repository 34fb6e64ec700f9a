"""The prediction step: what the model thinks of every image, for whoever looks at answers one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from densenet_jax.training.eval_step import Batch, Normalize, batch_logits


def make_predict_step(
    model: nn.Module, normalize: Normalize, *, classes: Sequence[int] | None = None
) -> Callable[[dict[str, Any], Batch], Batch]:
    """Builds `step(variables, batch) -> answers`, with the same logits as `make_eval_step` for the same arguments.

    Returns:
        A step whose result has "probability" float32 [b, k] and everything of the batch but its images.
    """

    def predict_step(variables: dict[str, Any], batch: Batch) -> Batch:
        logits = batch_logits(model, normalize, variables, batch["image"], classes)
        rest = {name: array for name, array in batch.items() if name != "image"}
        return {**rest, "probability": jax.nn.softmax(logits.astype(jnp.float32))}

    return predict_step
