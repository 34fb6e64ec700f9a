"""Saves and restores a run with Orbax.

A checkpoint at step s is `DIR/checkpoints/s/`: the state after s steps (which also gives the position in the data
order) and the resolved settings.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from densenet_jax.errors import UserError, first_line
from densenet_jax.system.console import print_status
from densenet_jax.system.disk import report_full_disk
from densenet_jax.training.best_metric import score_figures
from densenet_jax.training.integrity import (
    CHECKSUMS_MARK,
    METRICS_ITEM,
    DamagedCheckpointError,
    check_files,
    find_unreadable_scores,
    saved_figures,
    set_aside,
    write_checksums,
)
from densenet_jax.training.precision import LossScale
from densenet_jax.training.restore import (
    check_same_shapes,
    orbax_errors_only,
    read_saved_tree,
)
from densenet_jax.training.sharding import shardings_of, with_sharding
from densenet_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one work directory: the newest few and the best by a validation metric."""

    def __init__(self, workdir: str, *, max_to_keep: int = 10, metric: str = ""):
        """Opens `workdir/checkpoints`; `metric` is what the best checkpoint is best in, see `score_figures`."""
        self._last_saved: int | None = None
        self._metric = metric
        self.directory = os.path.join(os.path.abspath(workdir), "checkpoints")
        set_aside(self.directory, find_unreadable_scores(self.directory))
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(max_to_keep),
                checkpoint_managers.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        with orbax_errors_only():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep,
                    # The policy above decides what is kept; without this Orbax writes no metrics for it.
                    best_fn=self._score,
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
                ),
                item_names=("state", "data", "config"),
            )

    def save(
        self,
        step: int,
        state: TrainState,
        config: dict[str, Any],
        window: dict[str, float],
        metrics: dict[str, Any] | None = None,
        dataset: dict[str, Any] | None = None,
    ) -> None:
        """Starts writing `state`; returns once it is safe to donate it to the next step.

        Args:
            window: sums of the current log interval, so that its report is whole after a restart.
            metrics: validation figures at this step; None if it was not validated.
            dataset: the training data, from `densenet_jax.data.identity.identify`.

        Raises:
            UserError: the disk is full, now or in the save before; or the directory was removed.
        """
        if step in self._manager.all_steps():
            return
        position = {"next_step": step, "window": window, CHECKSUMS_MARK: True, "devices": jax.device_count()}
        position |= {"dataset": dataset} if dataset else {}
        self._last_saved = step
        with self._report_lost_files():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(position),
                    config=ocp.args.JsonSave(config),
                ),
                metrics=metrics,
            )

    def add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds validation metrics to the finished checkpoint of `step`, so that it can be the best.

        Raises:
            UserError: the disk is full.
        """
        path = self._path(step)
        if saved_figures(path) is not None:
            return
        with report_full_disk(self.directory):
            with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename=METRICS_ITEM)) as writer:
                writer.save(os.path.join(path, METRICS_ITEM), args=ocp.args.JsonSave(metrics))
            if jax.process_index() == 0:
                write_checksums(path, METRICS_ITEM)
        multihost_utils.sync_global_devices("a validation is added to a checkpoint")
        self._manager.reload()

    def _score(self, figures: dict[str, Any]) -> float:
        return score_figures(figures, self._metric)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, float]]:
        """Restores the state saved at `step`, laid out like the abstract state, and the sums of its log interval.

        If the precision was changed, a loss scale that only `like` has starts anew and one only in the checkpoint is
        dropped.

        Raises:
            DamagedCheckpointError: the checkpoint is not what was written.
            UserError: it can't be read, or is of another model.
        """
        path = self._path(step)
        whole = check_files(path)
        try:
            tree = read_saved_tree(path)
            # Compared before anything is read, or Orbax would print a hundred tracebacks.
            advice = "give the run's own --config or another --workdir"
            check_same_shapes(f"{path} is of another model", tree["params"], like.params, advice)
            scale = jax.eval_shape(LossScale.create) if tree.get("loss_scale") else None
            as_saved = like.replace(loss_scale=with_sharding(scale, like.step.sharding))  # type: ignore[attr-defined]
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(as_saved), data=ocp.args.JsonRestore())
            )
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever the damage leads to
            kind = UserError if whole else DamagedCheckpointError
            raise kind(f"{path} can't be restored: {first_line(error)}") from error
        if restored["data"]["next_step"] != step:
            raise DamagedCheckpointError(f"{path} is damaged: it was saved at step {restored['data']['next_step']}")
        if (devices := restored["data"].get("devices", jax.device_count())) != jax.device_count():
            print_status(f"continuing on {jax.device_count()} devices what {devices} began")
        state, wanted = restored["state"], like.loss_scale
        if (state.loss_scale is None) != (wanted is None):
            scale = None if wanted is None else jax.device_put(LossScale.create(), shardings_of(wanted))
            state = state.replace(loss_scale=scale)
        return state, restored["data"]["window"]

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, float]] | None:
        """Restores the newest readable checkpoint as `restore` does; reports damaged ones and sets them aside.

        Returns None if nothing was saved.

        Raises:
            UserError: there are checkpoints, but all are damaged; or one that is whole is of another model.
        """
        steps, damaged = sorted(self._manager.all_steps()), []
        for step in reversed(steps):
            try:
                restored = self.restore(step, like)
            except DamagedCheckpointError as error:
                if step == steps[0]:
                    raise UserError(f"{error}, and there is none before it; start again in a new --workdir.") from error
                logger.warning("%s; going back to the one before it.", error)
                damaged.append(step)
            else:
                set_aside(self.directory, damaged)
                self._manager.reload()
                return restored
        return None

    def _add_checksums(self) -> None:
        """Writes the checksums of a complete checkpoint before Orbax, which calls this, renames it."""
        if jax.process_index() == 0:
            for name in os.listdir(self.directory):
                if ".orbax-checkpoint-tmp" in name:
                    write_checksums(os.path.join(self.directory, name))

    def _path(self, step: int) -> str:
        return os.path.join(self.directory, str(step))

    def wait(self) -> None:
        """Waits until every save that was started is on disk.

        Raises:
            UserError: the disk is full, or the last save was removed.
        """
        with self._report_lost_files():
            self._manager.wait_until_finished()
        self._check_last_save()

    def close(self) -> None:
        """Waits as `wait` does, then closes the manager."""
        with self._report_lost_files():
            self._manager.close()
        self._check_last_save()

    def _check_last_save(self) -> None:
        if self._last_saved is not None and not os.path.isdir(self._path(self._last_saved)):
            raise UserError(self._lost_files())

    @contextlib.contextmanager
    def _report_lost_files(self) -> Iterator[None]:
        """Reports a full disk or a removed directory, whatever error Orbax raises for it."""
        if not os.path.isdir(self.directory):
            raise UserError(self._lost_files())
        try:
            with report_full_disk(self.directory):
                yield
        except UserError:
            self._last_saved = None  # that save failed, and was not removed
            raise
        except Exception as error:
            self._last_saved = None
            if os.path.isdir(self.directory):
                raise
            raise UserError(self._lost_files()) from error

    def _lost_files(self) -> str:
        return (
            f"{self.directory} was removed during the run, and what was saved there with it; bring it back from a "
            "copy, or train again"
        )
