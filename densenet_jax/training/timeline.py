"""Converts between epochs and steps, and schedules regular events; a batch may span two epochs."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The length of a run and its regular events, in steps done.

    Attributes:
        epochs: passes over the `examples` of the training split; fractions are allowed.
        eval_every_epochs: epochs between validations; there is one at the end as well.
        save_every_steps: steps between checkpoints; every validation saves as well.
        report_every_steps: steps between reports; the last step reports as well. 0: 50, in a short run fewer, so that
            its curves have at least twenty points where it has as many steps.
    """

    examples: int
    global_batch_size: int
    epochs: float
    eval_every_epochs: float
    save_every_steps: int
    report_every_steps: int

    @property
    def steps_per_epoch(self) -> float:
        """Steps per epoch; a fraction, since a batch may span two epochs."""
        return self.examples / self.global_batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_of(self.epochs)

    def steps_of(self, epochs: float) -> int:
        """Returns the first step count at which `epochs` passes are complete."""
        # Rounded first: 0.1 + 0.2 epochs must not become a step more than 0.3.
        return math.ceil(round(epochs * self.steps_per_epoch, 6))

    def epochs_done(self, step: int) -> float:
        """Returns the passes over the training split after `step` steps."""
        return step / self.steps_per_epoch

    def is_eval_step(self, step: int) -> bool:
        """Returns whether validation is due after `step` steps."""
        nth = round(self.epochs_done(step) / self.eval_every_epochs)
        due = (self.steps_of(n * self.eval_every_epochs) for n in (nth - 1, nth) if n > 0)
        return step == self.total_steps or step in due

    def stalled_since(self, scores: Mapping[int, float], patience_epochs: float) -> int | None:
        """Returns the step of the best score if the last one is `patience_epochs` later; None if not, or if that is 0.

        Of equal scores the first is the best.
        """
        if not scores or not patience_epochs:
            return None
        best = max(scores, key=lambda step: (scores[step], -step))
        # Validations are at whole steps: four of them, an epoch apart, may be a part of a step less than four epochs.
        waited = self.epochs_done(max(scores) - best + 1)
        return best if round(waited, 6) > patience_epochs else None

    def is_save_step(self, step: int) -> bool:
        """Returns whether a checkpoint is due after `step` steps."""
        return step % self.save_every_steps == 0 or self.is_eval_step(step)

    def is_report_step(self, step: int) -> bool:
        """Returns whether a report is due after `step` steps."""
        every = self.report_every_steps or max(1, min(50, self.total_steps // 20))
        return step % every == 0 or step == self.total_steps
