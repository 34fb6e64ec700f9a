"""Learning rates as pure functions of the step.

Steps count from 0, and step 0 is the first of the warmup where there is one. Every schedule works under `jax.jit` and
keeps its last value beyond its end.

- "constant" is `learning_rate` throughout.
- "multistep" drops at each milestone, counted from step 0, warmup included.
- "cosine" falls from `learning_rate` at the end of the warmup to `end_learning_rate` at `total_steps`
  (arXiv:1608.03983, one cycle).
- "exponential" multiplies by `decay_factor` every `decay_steps` after the warmup, in one fall per `decay_steps` where
  `staircase` and smoothly otherwise, and never goes below `end_learning_rate`.
- "cosine_restarts" is cosine over cycles of `cycle_steps`, `cycle_steps * cycle_multiplier`, ... after the warmup, each
  cycle's peak `cycle_decay` times the one before (arXiv:1608.03983).
- "one_cycle" rises along a cosine from `learning_rate / start_divisor` to `learning_rate` over `rise_fraction` of the
  steps after the warmup and falls to `learning_rate / start_divisor / end_divisor` at the last step (arXiv:1708.07120
  as torch's OneCycleLR does it).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from densenet_jax.choices import SCHEDULES
from densenet_jax.errors import UserError

Step = Int[Array, ""] | int
# step -> learning rate, in JAX's default float (float32 unless x64 is enabled)
Schedule = Callable[[Step], Float[Array, ""]]


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_learning_rate: float = 0.0,
    milestone_steps: Sequence[int] = (),
    milestone_rates: Sequence[float] = (),
    decay_factor: float = 0.1,
    decay_steps: int = 0,
    staircase: bool = False,
    end_learning_rate: float = 0.0,
    cycle_steps: int = 0,
    cycle_multiplier: float = 1.0,
    cycle_decay: float = 1.0,
    rise_fraction: float = 0.3,
    start_divisor: float = 25.0,
    end_divisor: float = 1e4,
) -> Schedule:
    """Builds one of `SCHEDULES`, step -> learning rate; all lengths are in optimizer steps.

    Args:
        total_steps: steps of the whole training, warmup included.
        warmup_steps: steps W of linear warmup in front: the rate at step s < W lies s/W of the way from
            `warmup_learning_rate` to what the schedule starts with at step W.
        milestone_steps: the first step of each new rate, increasing.
        milestone_rates: the rates of multistep, the first equal to `learning_rate`; either one more than
            milestones, or as many, each then holding until its milestone and the last beyond it. (): each milestone
            multiplies the rate by `decay_factor`.

    Raises:
        UserError: an unknown name, or values that contradict each other; the message names the key.
    """
    if not 0 <= warmup_steps < max(total_steps, 1):
        raise UserError(
            f"config.optim.warmup_epochs or warmup_steps is {warmup_steps} steps, but all of the training is "
            f"{total_steps}; shorten the warmup (0: none) or train longer."
        )
    if not 0 <= end_learning_rate <= learning_rate:
        raise UserError(
            f"config.optim.end_learning_rate is {end_learning_rate}; expected 0 to config.optim.learning_rate, "
            f"which is {learning_rate}."
        )
    span = total_steps - warmup_steps
    if name == "constant":
        main = _constant(learning_rate)
    elif name == "multistep":
        main = _multistep(learning_rate, milestone_steps, milestone_rates, decay_factor, warmup_steps)
    elif name == "cosine":
        main = _cosine(learning_rate, span, end_learning_rate)
    elif name == "exponential":
        main = _exponential(learning_rate, decay_factor, decay_steps, staircase, end_learning_rate)
    elif name == "cosine_restarts":
        main = _cosine_restarts(learning_rate, cycle_steps, cycle_multiplier, cycle_decay, end_learning_rate, span)
    elif name == "one_cycle":
        main = _one_cycle(learning_rate, span, rise_fraction, start_divisor, end_divisor)
    else:
        raise UserError(f"config.optim.schedule is {name!r}; expected one of {', '.join(SCHEDULES)}.")
    return _with_warmup(main, warmup_steps, warmup_learning_rate)


def _with_warmup(main: Schedule, warmup_steps: int, first: float) -> Schedule:
    if warmup_steps == 0:
        return main

    def schedule(step: Step) -> Float[Array, ""]:
        step = jnp.asarray(step)
        rate = main(jnp.maximum(step - warmup_steps, 0))
        rising = first + (rate - first) * (jnp.asarray(step, float) / warmup_steps)
        return jnp.where(step < warmup_steps, rising, rate)

    return schedule


def _constant(rate: float) -> Schedule:
    return lambda step: jnp.asarray(rate, float)


def _multistep(
    learning_rate: float, milestones: Sequence[int], rates: Sequence[float], factor: float, warmup_steps: int
) -> Schedule:
    if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
        raise UserError(f"config.optim.milestone_steps is {tuple(milestones)}; expected increasing steps.")
    if milestones and milestones[0] < max(warmup_steps, 1):
        raise UserError(
            f"config.optim.milestone_steps begins with {milestones[0]}; expected the first drop after step 0 and not "
            f"before the end of the warmup at step {warmup_steps}."
        )
    rates = rates or [learning_rate * factor**drops for drops in range(len(milestones) + 1)]
    if len(rates) not in (len(milestones), len(milestones) + 1):
        raise UserError(
            f"config.optim.milestone_rates has {len(rates)} rates for {len(milestones)} milestones; expected as many "
            "(each until its milestone) or one more (the last from the last milestone on)."
        )
    if not math.isclose(rates[0], learning_rate, rel_tol=1e-6):
        raise UserError(
            f"config.optim.milestone_rates begins with {rates[0]} but config.optim.learning_rate is {learning_rate}; "
            "expected the same value; set both, or leave milestone_rates empty."
        )
    stretches = rates if len(rates) > len(milestones) else [*rates, rates[-1]]
    boundaries = [step - warmup_steps for step in milestones]

    def schedule(step: Step) -> Float[Array, ""]:
        passed = jnp.sum(jnp.asarray(step) >= jnp.asarray(boundaries, jnp.int32))
        return jnp.asarray(stretches, float)[passed]

    return schedule


def _half_cosine(start: float | Array, end: float, fraction: Array) -> Array:
    weight = 0.5 * (1.0 + jnp.cos(math.pi * fraction))
    return start * weight + end * (1.0 - weight)


def _cosine(peak: float, span: int, floor: float) -> Schedule:
    def schedule(step: Step) -> Float[Array, ""]:
        return _half_cosine(peak, floor, jnp.asarray(jnp.minimum(step, span), float) / span)

    return schedule


def _exponential(peak: float, factor: float, decay_steps: int, staircase: bool, floor: float) -> Schedule:
    if decay_steps <= 0:
        raise UserError(f"config.optim.decay_steps is {decay_steps}; the exponential schedule expects more than 0.")
    if not 0 < factor <= 1:
        raise UserError(f"config.optim.decay_factor is {factor}; the exponential schedule expects a factor in (0, 1].")

    def schedule(step: Step) -> Float[Array, ""]:
        falls = jnp.asarray(step) // decay_steps if staircase else jnp.asarray(step, float) / decay_steps
        return jnp.maximum(peak * jnp.power(jnp.asarray(factor, float), falls), floor)

    return schedule


def _cosine_restarts(
    peak: float, cycle_steps: int, multiplier: float, decay: float, floor: float, span: int
) -> Schedule:
    if cycle_steps <= 0:
        raise UserError(f"config.optim.cycle_steps is {cycle_steps}; the schedule with restarts expects more than 0.")
    starts, length = [0], float(cycle_steps)
    while starts[-1] < span:
        starts.append(starts[-1] + round(length))
        length *= multiplier

    def schedule(step: Step) -> Float[Array, ""]:
        step = jnp.asarray(step)
        begin = jnp.asarray(starts, jnp.int32)
        cycle = jnp.minimum(jnp.sum(step >= begin) - 1, len(starts) - 2)
        length = begin[cycle + 1] - begin[cycle]
        fraction = jnp.minimum(jnp.asarray(step - begin[cycle], float) / length, 1.0)
        top = jnp.maximum(peak * jnp.power(jnp.asarray(decay, float), cycle), floor)
        return _half_cosine(top, floor, fraction)

    return schedule


def _one_cycle(peak: float, span: int, rise: float, start_divisor: float, end_divisor: float) -> Schedule:
    first = peak / start_divisor
    top, last = rise * span - 1.0, span - 1.0
    if top <= 0:
        raise UserError(
            f"config.optim.rise_fraction is {rise} of {span} steps, less than two; raise it or train longer."
        )

    def schedule(step: Step) -> Float[Array, ""]:
        position = jnp.minimum(jnp.asarray(step, float), last)
        rising = _half_cosine(first, peak, position / top)
        falling = _half_cosine(peak, first / end_divisor, (position - top) / (last - top))
        return jnp.where(position <= top, rising, falling)

    return schedule
