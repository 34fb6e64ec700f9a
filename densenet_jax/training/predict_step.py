"""The prediction step: what the model thinks of every image, for whoever looks at answers one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from densenet_jax.training.eval_step import Batch, Normalize, mean_logits, restrict


def make_predict_step(
    model: nn.Module, normalize: Normalize, *, classes: Sequence[int] | None = None
) -> Callable[[dict[str, Any], Batch], Batch]:
    """Builds `step(variables, batch) -> answers`, with the same logits as `make_eval_step` for the same arguments.

    Returns:
        A step whose result has "probability" float32 [b, k] and everything of the batch but its images.
    """

    def predict_step(variables: dict[str, Any], batch: Batch) -> Batch:
        def logits_of(images: UInt8[Array, "b h w c"]) -> Float[Array, "b k"]:
            return model.apply(variables, normalize(images), train=False)  # type: ignore[return-value]

        images = batch["image"]
        logits = logits_of(images) if images.ndim == 4 else mean_logits(logits_of, images)
        if classes is not None:
            logits = restrict(logits, classes)
        rest = {name: array for name, array in batch.items() if name != "image"}
        return {**rest, "probability": jax.nn.softmax(logits.astype(jnp.float32))}

    return predict_step
