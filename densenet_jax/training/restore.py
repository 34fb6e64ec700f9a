"""Restores a checkpoint's weights, and compares saved arrays with a model's."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax

from densenet_jax.errors import UserError, first_line
from densenet_jax.training.integrity import DamagedCheckpointError, check_files, finished_steps


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
