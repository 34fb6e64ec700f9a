"""Makes the loss of `config.train`, and the schedule and the optimizer of `config.optim`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from densenet_jax.choices import LOSSES, parse_weights
from densenet_jax.errors import UserError
from densenet_jax.training.losses import Loss, balanced_weights, make_loss
from densenet_jax.training.optimizer import make_optimizer
from densenet_jax.training.schedules import Schedule, make_schedule
from densenet_jax.training.timeline import Timeline


def schedule_of(config: Any, timeline: Timeline) -> Schedule:
    """Makes the learning rate as a function of the step, scaled to the batch if a base batch size is given."""

    def steps(in_steps: int, in_epochs: float) -> int:
        return in_steps or timeline.steps_of(in_epochs)

    scale = 1.0
    if config.optim.base_batch_size:
        scale = config.train.global_batch_size / config.optim.base_batch_size
    return make_schedule(
        config.optim.schedule,
        learning_rate=config.optim.learning_rate * scale,
        total_steps=timeline.total_steps,
        warmup_steps=steps(config.optim.warmup_steps, config.optim.warmup_epochs),
        warmup_learning_rate=config.optim.warmup_learning_rate * scale,
        milestone_steps=config.optim.milestone_steps
        or tuple(timeline.steps_of(epochs) for epochs in config.optim.milestone_epochs),
        milestone_rates=tuple(rate * scale for rate in config.optim.milestone_rates),
        decay_factor=config.optim.decay_factor,
        decay_steps=steps(config.optim.decay_steps, config.optim.decay_epochs),
        staircase=config.optim.staircase,
        end_learning_rate=config.optim.end_learning_rate * scale,
        cycle_steps=steps(config.optim.cycle_steps, config.optim.cycle_epochs),
        cycle_multiplier=config.optim.cycle_multiplier,
        cycle_decay=config.optim.cycle_decay,
        rise_fraction=config.optim.rise_fraction,
        start_divisor=config.optim.start_divisor,
        end_divisor=config.optim.end_divisor,
    )


def optimizer_of(config: Any, schedule: Schedule) -> optax.GradientTransformation:
    """Makes the optax optimizer."""
    return make_optimizer(
        config.optim.name,
        schedule,
        momentum=config.optim.momentum,
        nesterov=config.optim.nesterov,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
        clip_grad_norm=config.optim.clip_grad_norm,
        betas=config.optim.betas,
        rms_decay=config.optim.rms_decay,
        epsilon=config.optim.epsilon,
        freeze=config.optim.freeze,
        rate_multipliers=config.optim.rate_multipliers,
        layer_decay=config.optim.layer_decay,
    )


def loss_of(config: Any, num_classes: int, train_labels: Callable[[], np.ndarray]) -> Loss:
    """Makes the loss; `train_labels` reads the labels of the training split and is called for balanced weights only.

    Raises:
        UserError: there are more or fewer weights than classes.
    """
    weights: tuple[float, ...] = ()
    if config.train.class_weights == "balanced":
        weights = balanced_weights(train_labels(), num_classes)
    elif config.train.class_weights != "none":
        weights = parse_weights(config.train.class_weights)
    if weights and len(weights) != num_classes:
        raise UserError(
            f"config.train.class_weights has {len(weights)} numbers, but {config.data.name} has {num_classes} "
            "classes; give one number a class."
        )
    usual = next(name for name, kind in LOSSES.items() if kind.labels == config.data.labels)
    return make_loss(
        config.train.loss or usual,
        gammas=tuple(config.train.loss_gammas),
        margin=config.train.loss_margin,
        label_smoothing=config.train.label_smoothing,
        class_weights=weights,
    )
