"""Finds, describes and restores the checkpoints of a run that exists, and compares saved arrays with a model's."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax

from densenet_jax.errors import UserError, first_line
from densenet_jax.training.best_metric import describe_score, score_figures
from densenet_jax.training.integrity import (
    DamagedCheckpointError,
    check_files,
    find_missing_file,
    finished_steps,
    saved_figures,
)

logger = logging.getLogger(__name__)


def best_step(directory: str, metric: str = "") -> int | None:
    """Returns the step of the best validation by `metric`, the newest of equals; None if none was validated."""
    scores: dict[int, float] = {}
    for step in _whole_steps(directory):
        try:
            figures = saved_figures(os.path.join(directory, str(step)))
        except DamagedCheckpointError as error:
            logger.warning("%s; another one may have been better.", error)
        else:
            scores |= {} if figures is None else {step: score_figures(figures, metric)}
    return max(scores, key=lambda step: (scores[step], step)) if scores else None


def _whole_steps(directory: str) -> list[int]:
    """Lists the steps whose checkpoint has lost no file, oldest first."""
    return [step for step in finished_steps(directory) if not find_missing_file(os.path.join(directory, str(step)))]


def find_checkpoint(workdir: str, which: str, metric: str = "") -> tuple[str, int]:
    """Finds the directory of a run's checkpoints and the step that `which` ("latest", "best" or a number) names.

    `metric` is what the best is best in, see `score_figures`.

    Raises:
        UserError: there is no such checkpoint, or it has lost files.
    """
    directory = os.path.join(os.path.abspath(workdir), "checkpoints")
    if not os.path.isdir(directory):
        raise UserError(f"--workdir {workdir} has no checkpoints; train there first, or name a run's directory.")
    steps, everything = _whole_steps(directory), finished_steps(directory)
    if not everything:
        raise UserError(f"{directory} holds no finished checkpoint; train first, or name a run's directory.")
    if which == "best":
        best = best_step(directory, metric)
        if best is None:
            raise UserError(f"{directory} holds no validated checkpoint; give latest or one of {steps}.")
        return directory, best
    if which != "latest" and not (which.isdigit() and int(which) in everything):
        raise UserError(f"{directory} has no step {which}; it has {', '.join(map(str, steps)) or 'none'}.")
    step = everything[-1] if which == "latest" else int(which)
    path = os.path.join(directory, str(step))
    if missing := find_missing_file(path):
        whole = f"give config.eval.checkpoint={steps[-1]}" if steps else "no other is whole"
        raise DamagedCheckpointError(f"{path} is damaged: {missing} is missing; {whole}")
    return directory, step


def describe_checkpoints(workdir: str, metric: str = "") -> str:
    """Describes a run's latest and best checkpoints in one line, the best by `metric`.

    Raises:
        UserError: there are none.
    """
    directory, latest = find_checkpoint(workdir, "latest")
    best = best_step(directory, metric)
    if best is None:
        return f"the latest checkpoint is step {latest}; none was validated"
    figures = saved_figures(os.path.join(directory, str(best))) or {}
    which = "also the best" if best == latest else f"the best is step {best}"
    return f"the latest checkpoint is step {latest}, {which} (validation {describe_score(figures, metric)})"


@contextlib.contextmanager
def orbax_errors_only() -> Iterator[None]:
    """Silences Orbax's warnings about partial and read-only restores, which are intended."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        log.setLevel(level)


def read_saved_tree(path: str) -> dict[str, Any]:
    """Reads shapes and dtypes of the state in the checkpoint at `path`; None for parts that were not saved."""
    import orbax.checkpoint as ocp  # not at the top: checks of a run don't need it

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.metadata(os.path.join(path, "state")).item_metadata.tree


def check_same_shapes(what: str, saved: Any, wanted: Any, advice: str) -> None:
    """Compares the names and shapes of saved arrays with a model's.

    `what` begins the error message and `advice` ends it.

    Raises:
        UserError: they differ; the message names the first difference.
    """
    theirs, ours = (
        {jax.tree_util.keystr(name, simple=True, separator="/"): tuple(leaf.shape) for name, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (saved, wanted))
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{what}: {name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here; {advice}."
            )


def _newest_whole(directory: str, damaged: int) -> int | None:
    """Finds the newest undamaged checkpoint other than `damaged`."""
    for step in reversed(finished_steps(directory)):
        with contextlib.suppress(DamagedCheckpointError):
            if step != damaged and check_files(os.path.join(directory, str(step))):
                return step
    return None


def restore_variables(
    directory: str, step: int, sharding: jax.sharding.Sharding, averaged: bool = True
) -> dict[str, Any]:
    """Restores the parameters and batch statistics saved at `step` in `directory`, each laid out by `sharding`.

    If `averaged`, takes the moving average where the run keeps one.

    Raises:
        UserError: the checkpoint can't be read.
    """
    import orbax.checkpoint as ocp

    path = os.path.join(directory, str(step), "state")
    try:
        check_files(os.path.dirname(path))
    except DamagedCheckpointError as error:
        good = _newest_whole(directory, step)
        advice = "no other checkpoint is whole" if good is None else f"step {good} is whole: --checkpoint={good}"
        raise DamagedCheckpointError(f"{error}; {advice}.") from error
    try:
        with orbax_errors_only(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(path).item_metadata.tree
            wanted = {name: tree[name] for name in ("params", "batch_stats") if tree.get(name)}
            if averaged and tree.get("average"):
                wanted = {"average": tree["average"]}
            restore_args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), wanted)
            restored = reader.restore(
                path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
            )
            return {"batch_stats": {}, **restored.get("average", restored)}
    except Exception as error:  # as in Checkpoints.restore
        raise UserError(f"{os.path.dirname(path)} can't be restored: {first_line(error)}") from error


def load_checkpoint(workdir: str, step: int | None = None, averaged: bool = True) -> dict[str, Any]:
    """Loads {"params", "batch_stats"} of a run onto the default device, without its model or settings.

    Takes the newest step by default and, if `averaged`, the moving average where the run keeps one, as validation does.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    directory, chosen = find_checkpoint(workdir, "latest" if step is None else str(step))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return restore_variables(directory, chosen, here, averaged)
