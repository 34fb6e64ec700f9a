"""What is saved of a run, and how it comes back: Orbax below, our promises above.

A checkpoint at step s is `DIR/checkpoints/s/` and holds the state after s steps, the position in the data order
(s again, since the order is a function of the step) and the resolved settings.
"""

import logging
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from densenet_jax.errors import UserError, first_line
from densenet_jax.training.state import TrainState

logger = logging.getLogger(__name__)
_BEST_METRIC = "top1"


class Checkpoints:
    """The checkpoints of one work directory, newest few and the best by validation accuracy."""

    def __init__(self, workdir: str, *, max_to_keep: int = 10, read_only: bool = False):
        """Opens `workdir/checkpoints`.

        Args:
            workdir: the run's directory.
            max_to_keep: newest checkpoints kept; the best by validation top-1 is kept besides.
            read_only: changes nothing on disk, not even by creating a directory.
        """
        self.directory = os.path.join(os.path.abspath(workdir), "checkpoints")
        if read_only and not os.path.isdir(self.directory):
            raise UserError(f"--workdir {workdir} has no checkpoints; train there first, or name a run's directory.")
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(max_to_keep),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[_BEST_METRIC], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                # The policy above decides what is kept; without this Orbax writes no metrics for it to go by.
                best_fn=lambda metrics: metrics[_BEST_METRIC],
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
            item_names=("state", "data", "config"),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        config: dict[str, Any],
        window: dict[str, float],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts writing `state`; returns once it is safe to donate it to the next step.

        Args:
            step: steps done, as `state.step` says.
            state: what to save.
            config: the resolved settings.
            window: sums of the report under way, so that the next report is whole after a restart, too.
            metrics: validation metrics at this step, with "top1", where there are some.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"next_step": step, "window": window}),
                config=ocp.args.JsonSave(config),
            ),
            metrics=metrics,
        )

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest validation top-1, the newest of equals; None where none was validated."""
        scores = {
            step: metrics[_BEST_METRIC]
            for step in self.steps()
            if (metrics := self._manager.metrics(step)) and _BEST_METRIC in metrics
        }
        return max(scores, key=lambda step: (scores[step], step)) if scores else None

    def resolve(self, which: str) -> int:
        """The step that "latest", "best" or a number names.

        Raises:
            UserError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory} holds no finished checkpoint; train first, or name a run's directory.")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self.best_step()
            if best is None:
                raise UserError(f"{self.directory} holds no validated checkpoint; give latest or one of {steps}.")
            return best
        if int(which) not in steps:
            raise UserError(f"{self.directory} has no step {which}; it has {', '.join(map(str, steps))}.")
        return int(which)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The state saved at `step`, laid out as the abstract state `like` says, and the sums of the report under way.

        Raises:
            UserError: the checkpoint can't be read or is of another model.
        """
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
            )
        except Exception as error:  # Orbax and TensorStore raise whatever the damage leads to
            path = os.path.join(self.directory, str(step))
            raise UserError(f"{path} can't be restored: {first_line(error)}") from error
        if restored["data"]["next_step"] != step:
            raise UserError(f"{self.directory}/{step} says it is of step {restored['data']['next_step']}.")
        return restored["state"], restored["data"]["window"]

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, float]] | None:
        """What `restore` gives for the newest checkpoint that can be read; damaged ones are named and passed over.

        None where nothing was saved.

        Raises:
            UserError: there are checkpoints, but none can be restored.
        """
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                restored = self.restore(step, like)
            except UserError as error:
                if step == steps[0]:
                    raise
                logger.warning("%s; going back to the one before it.", error)
                damaged.append(step)
            else:
                self._set_aside(damaged)
                return restored
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints out of the way of new ones of the same steps; nothing is deleted."""
        if not steps:
            return
        aside = os.path.join(os.path.dirname(self.directory), "damaged_checkpoints")
        if jax.process_index() == 0:
            os.makedirs(aside, exist_ok=True)
            for step in steps:
                source, target = os.path.join(self.directory, str(step)), os.path.join(aside, str(step))
                while os.path.exists(target):
                    target += "_again"
                os.rename(source, target)
        multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when everything started is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self._manager.close()


def load_checkpoint(workdir: str, step: int | None = None, averaged: bool = True) -> dict[str, Any]:
    """Loads {"params", "batch_stats"} of a run onto the default device, without its model or settings.

    Args:
        workdir: the run's directory.
        step: which checkpoint; None takes the newest.
        averaged: take their moving average where the run has kept one, as validation does.

    Raises:
        UserError: there is no such checkpoint.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        chosen = checkpoints.resolve("latest" if step is None else str(step))
    finally:
        checkpoints.close()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return restore_variables(checkpoints.directory, chosen, here, averaged)


def restore_variables(
    directory: str, step: int, sharding: jax.sharding.Sharding, averaged: bool = True
) -> dict[str, Any]:
    """The parameters and batch statistics saved at `step`, each laid out by `sharding`.

    Args:
        directory: the run's checkpoints.
        step: which one.
        sharding: of every array.
        averaged: take their moving average where the run has kept one.

    Raises:
        UserError: the checkpoint can't be read.
    """
    path = os.path.join(directory, str(step), "state")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(path).item_metadata.tree
            wanted = {name: tree[name] for name in ("params", "batch_stats")}
            if averaged and tree.get("average"):
                wanted = {"average": tree["average"]}
            restore_args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), wanted)
            restored = reader.restore(
                path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
            )
            return restored.get("average", restored)
    except Exception as error:  # as in Checkpoints.restore
        raise UserError(f"{os.path.dirname(path)} can't be restored: {first_line(error)}") from error
