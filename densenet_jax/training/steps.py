"""The training step: a pure function of a state and a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from densenet_jax.kernels.cpu.elementwise import update_in_place
from densenet_jax.rng import Purpose, step_key
from densenet_jax.training.accumulate import accumulate_gradients
from densenet_jax.training.ema import ema_decay, update_ema
from densenet_jax.training.losses import SOFTMAX, Loss
from densenet_jax.training.metrics import ClassificationSums, LabelSums
from densenet_jax.training.nonfinite import not_finite, tree_norm
from densenet_jax.training.precision import LossScale, all_finite, select
from densenet_jax.training.sharding import replicated
from densenet_jax.training.state import TrainState

Batch = dict[str, Array]
# uint8 images, labels and the step -> what the model is given, and targets of the loss
Augment = Callable[[Array, Array, Array], tuple[Array, Array]]


@flax.struct.dataclass
class StepReport:
    """Figures of one step.

    Attributes:
        sums: over the batch; under mixup, over the mixed examples.
        grad_norm: before clipping, 0 in a skipped step; shows a fault a step before the loss does.
        skipped: 1 if the step changed nothing because a scaled gradient was not finite.
        faulty_gradients: one flag per parameter, True if its gradient is not finite.
        faulty_statistics: one flag per running statistic.
    """

    sums: ClassificationSums | LabelSums
    grad_norm: Float[Array | np.ndarray, ""]
    skipped: Int[Array | np.ndarray, ""]
    faulty_gradients: Bool[Array | np.ndarray, " n"]
    faulty_statistics: Bool[Array | np.ndarray, " m"]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`step(state, batch) -> (state, report)`, to be jitted with the state donated.

    The batch has "image" uint8 [b, h, w, c] and "label", int32 [b] or for many labels an image float32 [b, k] of 1, 0
    and NaN for unknown. It is global: batch norm's statistics are over all of it (or over the model's groups), and the
    compiler inserts the collectives. The loss is a mean over the batch too, whatever its microbatches: its divisor is
    that of the whole batch.

    Attributes:
        model: called as `model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=...)`.
        augment: makes model inputs and targets from a batch's images and labels.
        seed: the run's seed, for dropout and drop path.
        average_decay: kept share of the moving average; unused if the state has none.
        mesh: gathers the parameters of a state that is split over its devices; None if the state is replicated.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    augment: Augment
    seed: int
    loss: Loss = SOFTMAX
    microbatches: int = 1
    average_decay: float = 0.0
    mesh: Mesh | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        """Runs one step."""
        images, targets = self.augment(batch["image"], batch["label"], state.step)
        divisor = self.loss.divisor(targets)
        gradients, batch_stats, (losses, logits) = accumulate_gradients(
            lambda *args: self._gradients(state.step, state.loss_scale, divisor, *args),
            state.params,
            state.batch_stats,
            (images, targets),
            self.microbatches,
        )
        if state.loss_scale is not None:
            gradients = state.loss_scale.unscale(gradients)
        params, opt_state, average = update_in_place(
            self._update, (state.params, state.opt_state, state.average), gradients, batch_stats, state.step
        )
        new = state.replace(  # type: ignore[attr-defined]
            params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
        )
        skipped = jnp.zeros((), jnp.int32)
        if state.loss_scale is not None:
            finite = all_finite(gradients)
            new = select(finite, new, state).replace(loss_scale=state.loss_scale.update(finite))
            skipped = 1 - finite.astype(jnp.int32)
        report = StepReport(
            sums=self.loss.sums(logits, targets, losses),
            grad_norm=jnp.where(skipped == 1, 0.0, tree_norm(gradients)),
            skipped=skipped,
            faulty_gradients=not_finite(gradients),
            faulty_statistics=not_finite(batch_stats),
        )
        return new.replace(step=state.step + 1), report

    def _update(self, state: tuple[Any, Any, Any], gradients: Any, batch_stats: Any, step: Array) -> tuple[Any, ...]:
        """Returns parameters, optimizer state and moving average after an update."""
        params, opt_state, average = state
        updates, opt_state = self.optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        if average is not None:
            variables = {"params": params, "batch_stats": batch_stats}
            average = update_ema(average, variables, ema_decay(step, self.average_decay))
        return params, opt_state, average

    def _gradients(
        self,
        step: Array,
        loss_scale: LossScale | None,
        divisor: Array | None,
        params: Any,
        batch_stats: Any,
        part: Any,
        number: Array,
    ) -> tuple[Any, Any, Any]:
        images, targets = part
        dropout = jax.random.fold_in(step_key(self.seed, Purpose.DROPOUT, step), number)
        paths = {}
        if getattr(self.model, "drop_path_rate", 0):
            paths["drop_path"] = jax.random.fold_in(step_key(self.seed, Purpose.DROP_PATH, step), number)

        def loss_of(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
            if self.mesh is not None:
                params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
            logits, mutated = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout, **paths},
            )
            losses = self.loss(logits, targets)
            # The mean of the microbatches' losses is the sum over the batch by its divisor.
            loss = jnp.mean(losses) if divisor is None else jnp.sum(losses) * (self.microbatches / divisor)
            loss = loss if loss_scale is None else loss_scale.scale_loss(loss)
            return loss, (losses, logits, mutated.get("batch_stats", {}))

        gradients, (losses, logits, batch_stats) = jax.grad(loss_of, has_aux=True)(params)
        return gradients, batch_stats, (losses, logits)
