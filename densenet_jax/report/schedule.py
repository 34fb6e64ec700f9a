"""Plots a recipe's learning rate schedule without training."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.errors import report_write_errors
from densenet_jax.report.plots import LIGHT, Line, draw_lines, make_axes, to_png
from densenet_jax.system.console import print_status
from densenet_jax.training.schedules import Schedule
from densenet_jax.training.timeline import Timeline


def plot_schedule(schedule: Schedule, timeline: Timeline, workdir: str, title: str) -> dict[str, str | int | float]:
    """Draws the learning rate over all steps to WORKDIR/schedule.png and prints its turning points.

    Returns:
        {"path", "total_steps", "peak_learning_rate", "end_learning_rate"}.

    Raises:
        UserError: the picture can't be written.
    """
    rates = all_rates(schedule, timeline.total_steps)
    per_epoch = timeline.steps_per_epoch
    print_status(f"{timeline.total_steps} steps, {per_epoch:.1f} an epoch, of {timeline.global_batch_size} images")
    for step in turning_points(rates):
        print_status(f"step {step:>9}  epoch {timeline.epochs_done(step):>7.2f}  learning rate {rates[step]:.6g}")
    path = os.path.join(workdir, "schedule.png")
    with report_write_errors(path, "choose another --workdir"):
        os.makedirs(workdir, exist_ok=True)
        _draw(path, rates, per_epoch, title)
    return {
        "path": path,
        "total_steps": timeline.total_steps,
        "peak_learning_rate": float(rates.max()),
        "end_learning_rate": float(rates[-1]),
    }


def all_rates(schedule: Schedule, total_steps: int) -> np.ndarray:
    """Returns the rate of every step as float64 [total_steps]; training rounds it to float32."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(total_steps)))


def turning_points(rates: np.ndarray, most: int = 40) -> list[int]:
    """Returns the steps at which the rate, float [steps], starts, jumps, turns, begins to move or rest, and ends.

    A schedule with more jumps than `most` (a staircase) is cut before its last step.
    """
    slopes = np.diff(rates)
    size = np.abs(slopes)
    # A jump is far larger than the changes before and after it.
    around = np.maximum(np.append(0.0, size[:-1]), np.append(size[1:], 0.0))
    jumps = np.flatnonzero((size > 1e-3 * np.maximum(rates[:-1], rates[1:])) & (size > 10 * around)) + 1
    smooth = np.where(np.isin(np.arange(1, len(rates)), jumps), 0.0, slopes)
    course = np.sign(np.where(np.abs(smooth) > 1e-12 * rates.max(initial=0.0), smooth, 0.0))
    turns = np.flatnonzero(course[1:] * course[:-1] < 0) + 1
    ends = np.flatnonzero((course[:-1] > 0) & (course[1:] == 0)) + 1  # a warmup that ends on a plateau
    inner = sorted({int(step) for step in (*jumps, *turns, *ends)} - {0, len(rates) - 1})
    return sorted({0, *inner[:most], len(rates) - 1})


def _draw(path: str, rates: np.ndarray, steps_per_epoch: float, title: str) -> None:
    figure, axes = make_axes(LIGHT, (8.0, 4.0))
    shown = np.unique(np.append(np.arange(0, len(rates), max(1, len(rates) // 20_000)), len(rates) - 1))
    draw_lines(axes, [Line(title, shown, rates[shown])], LIGHT)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.set_xlim(0, max(1, len(rates) - 1))
    axes.set_ylim(bottom=0)
    epochs = axes.secondary_xaxis(
        "top", functions=(lambda steps: steps / steps_per_epoch, lambda epochs: epochs * steps_per_epoch)
    )
    epochs.set_xlabel("epoch", fontsize=9)
    with open(path, "wb") as file:
        file.write(to_png(figure))
