"""The training step and the evaluation step: pure functions of a state and a batch."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt8

from densenet_jax.training.losses import cross_entropy
from densenet_jax.training.metrics import ClassificationSums
from densenet_jax.training.rng import Purpose, step_key
from densenet_jax.training.state import TrainState

Batch = dict[str, Array]
# uint8 images and the step -> what the model is given
Preprocess = Callable[[UInt8[Array, "b h w c"], Int[Array, ""]], Float[Array, "b h2 w2 c"]]


@flax.struct.dataclass
class StepReport:
    """What a step tells: sums over its batch, and the norm of its gradient, which shows a fault a step early."""

    sums: ClassificationSums
    grad_norm: Float[Array, ""]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocess: Preprocess,
    *,
    seed: int,
    label_smoothing: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """Builds `step(state, batch) -> (state, report)`.

    Batch norm's statistics are those of the whole global batch (or of the model's groups), however many devices it
    is spread over: the step is written for the global batch and the compiler inserts the collectives.

    Args:
        model: called as `model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=...)`.
        optimizer: any optax transformation.
        preprocess: uint8 images and the step to what the model is given; augmentation happens here.
        seed: the run's seed, for dropout.
        label_smoothing: share of the target spread evenly over all classes.

    The batch has "image" uint8 [b, h, w, c] and "label" int32 [b].
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        images = preprocess(batch["image"], state.step)
        labels = batch["label"]

        def loss_of(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
            logits, mutated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": step_key(seed, Purpose.DROPOUT, state.step)},
            )
            losses = cross_entropy(logits, labels, label_smoothing)
            return jnp.mean(losses), (losses, logits, mutated["batch_stats"])

        gradients, (losses, logits, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        report = StepReport(
            sums=ClassificationSums.from_batch(logits, labels, losses),
            grad_norm=optax.global_norm(gradients),
        )
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, report

    return train_step


def make_eval_step(
    model: nn.Module, preprocess: Callable[[UInt8[Array, "b h w c"]], Float[Array, "b h w c"]]
) -> Callable[[dict[str, Any], Batch], ClassificationSums]:
    """Builds `step(variables, batch) -> sums` over the examples that the batch's mask names.

    The batch has "image" uint8 [b, h, w, c], "label" int32 [b] and "mask" bool [b]; an example whose mask is False is
    padding and counts nowhere.
    """

    def eval_step(variables: dict[str, Any], batch: Batch) -> ClassificationSums:
        logits: Array = model.apply(variables, preprocess(batch["image"]), train=False)  # type: ignore[assignment]
        labels: Int[Array, " b"] = batch["label"]
        mask: Bool[Array, " b"] = batch["mask"]
        return ClassificationSums.from_batch(logits, labels, cross_entropy(logits, labels, 0.0), mask)

    return eval_step
