"""The training loop: next batch, step, report, evaluate, save, stop."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from densenet_jax.config import flatten, to_dict
from densenet_jax.data.identity import Identity, read_identity
from densenet_jax.distributed import processes
from densenet_jax.distributed.preemption import Preempted, StopRequest
from densenet_jax.experiment import Experiment, augmented_samples
from densenet_jax.run.evaluate import evaluate, figures_by_class, figures_of
from densenet_jax.run.log_interval import Window, runs_alone, wait_for_end
from densenet_jax.run.metrics_file import read_metrics
from densenet_jax.run.watchdog import Watchdog
from densenet_jax.system.console import Bar, print_status, spinner
from densenet_jax.system.disk import report_full_disk
from densenet_jax.system.host import memory_used
from densenet_jax.system.profiler import Profile
from densenet_jax.training.best_metric import (
    METRIC_WORDS,
    NEED_CONFUSION,
    describe_figures,
    describe_score,
    score_figures,
    show_score,
)
from densenet_jax.training.integrity import finished_steps
from densenet_jax.training.metrics import ClassificationSums, LabelSums
from densenet_jax.training.restore import describe_checkpoints
from densenet_jax.training.sharding import to_devices
from densenet_jax.training.state import TrainState
from densenet_jax.workdir import claim_workdir, only_run_in, write_labels

_CLOSING_SECS = 15  # closing waits for other processes, which may be stuck if this one failed


class Trainer:
    """One run in one work directory, from its newest checkpoint to its end."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: str,
        stop: StopRequest,
        watchdog: Watchdog,
        profile: Profile,
        dataset: Identity,
        check_workdir: Callable[[], None],
    ) -> None:
        """Compiles the steps and restores or creates the state.

        Raises:
            UserError: something in the settings, the data or the work directory is wrong.
        """
        self._experiment, self._dataset, self._profile = experiment, dataset, profile
        self._stop, self._watchdog, self._check_workdir = stop, watchdog, check_workdir
        self._config = to_dict(experiment.config)
        self._timeline, self._metric = experiment.timeline, experiment.best_metric
        _announce(experiment)
        # These load Orbax and TensorBoard: the run is checked before.
        from densenet_jax.run.metric_writers import Writers
        from densenet_jax.training.checkpoint import Checkpoints

        keep = experiment.config.checkpoint.max_to_keep
        self._checkpoints = Checkpoints(workdir, max_to_keep=keep, metric=self._metric)
        restored = self._checkpoints.restore_newest(experiment.abstract_state)
        compiling = time.perf_counter()
        with spinner("compiling"):
            self._train_step = experiment.compile_train_step()
            self._runs_alone = runs_alone(self._train_step)
            self._eval_step = experiment.compile_eval_step(confusion=self._counts_by_class)
        # Extra figures for the first report.
        self._at_start = {"compile_secs": round(time.perf_counter() - compiling, 2)}
        self._state: TrainState
        self._begun: dict[str, float] | None
        self._state, self._begun = restored or (experiment.initial_state(), None)
        many = experiment.many_labels
        self._no_sums = LabelSums.zeros(experiment.num_classes) if many else ClassificationSums.zeros()
        self._step = int(self._state.step)
        if self._step:
            print_status(f"continuing after step {self._step}")
        self._writers = Writers(workdir, resumed_step=self._step)
        if not self._step and self._writers.writes:
            samples = augmented_samples(experiment)
            self._writers.describe(flatten(self._config), samples.images, samples.titles)
        validated = {
            record["step"]: score_figures(record, self._metric)
            for record in read_metrics(workdir)
            if record["split"] == "validation"
        }
        self._scores = {step: score for step, score in validated.items() if step <= self._step}
        self._validated = self._step in validated

    def run(self) -> dict[str, Any]:
        """Trains to the end; returns the last validation's figures and the step.

        Raises:
            Preempted: asked to stop; the state is saved.
            UserError: the loss is not finite, or a record can't be read.
        """
        processes.wait_for_all("compiled")
        experiment = self._experiment
        result: dict[str, Any] = {}
        if self._step and self._timeline.is_eval_step(self._step):
            result = self._validate(record=not self._validated)
            self._checkpoints.add_metrics(self._step, result)
        if self._step == self._timeline.total_steps or self._has_stalled():
            print_status("nothing left to train")
            return result or self._validate(record=False)  # the validations may have been at other steps before
        window = Window(self._step, self._state, self._no_sums, self._begun)
        with (
            contextlib.closing(self._profile),
            experiment.data.train_batches(self._step) as batches,
            contextlib.closing(Bar("training", self._timeline.total_steps, self._step)) as bar,
        ):
            while self._step < self._timeline.total_steps:
                number = self._step + 1
                with self._profile.step(number):
                    self._watchdog.begins(f"waiting for the images of step {number}")
                    waiting = time.perf_counter()
                    batch = to_devices(next(batches), experiment.mesh)
                    waited = time.perf_counter() - waiting
                    self._watchdog.begins(f"the devices are at step {number} or the two before it")
                    self._state, report = self._train_step(self._state, batch)
                self._step = number
                self._profile.ends(number, self._state)
                window.add(report, experiment.config.train.global_batch_size, waited)
                if self._runs_alone:
                    wait_for_end(report)
                bar.advance()
                stopping = self._stop.due(self._step)
                if self._timeline.is_report_step(self._step):
                    window.check_finite()
                    self._report(window, bar)
                    window = Window(self._step, self._state, self._no_sums)
                stopping = stopping and self._step < self._timeline.total_steps
                if self._timeline.is_save_step(self._step) or stopping:
                    window.check_finite()
                    with window.paused():
                        # A stop must not wait for validation; the next start makes up for it.
                        validate = self._timeline.is_eval_step(self._step) and not stopping
                        result = self._validate() if validate else {}
                        self._watchdog.begins(f"saving after step {self._step}")
                        self._check_workdir()
                        self._checkpoints.save(
                            self._step, self._state, self._config, window.begun(), result or None, self._dataset
                        )
                if self._has_stalled():
                    break
                if stopping:
                    raise Preempted(f"stopped and saved after step {self._step}; the same command continues it")
        return result

    def close(self) -> None:
        """Waits until everything is on disk."""
        try:
            self._checkpoints.close()
        finally:
            self._writers.close()

    def _report(self, window: Window, bar: Bar) -> None:
        figures = window.sums.compute()
        epoch = self._timeline.epochs_done(self._step)
        scaling = self._state.loss_scale
        skipped = {} if scaling is None else {"skipped_steps": int(scaling.skipped_steps)}
        # The schedule counts updates, and a skipped step makes none.
        rate = float(self._experiment.schedule(self._step - 1 - skipped.get("skipped_steps", 0)))
        speed = window.speed()
        values = {"epoch": round(epoch, 4), **_means(figures), "learning_rate": rate, **speed}
        values |= memory_used() | skipped | self._at_start
        self._at_start = {}
        self._writers.write(self._step, "train", values)
        augment = self._experiment.config.augment
        mixed = " of mixed images" if augment.mixup_alpha or augment.cutmix_alpha else ""
        bar.figures(
            f"loss {figures['loss']:.4f}",
            f"{speed['images_per_sec']:.0f} images/s",
            f"lr {rate:.4g}",
            f"top-1{mixed} {figures['top1']:.2%}" if "top1" in figures else f"F1{mixed} {figures['f1']:.4f}",
            f"epoch {epoch:.1f}",
            f"waiting {speed['data_wait_fraction']:.0%}",
        )

    def _validate(self, record: bool = True) -> dict[str, Any]:
        """Evaluates the moving average, if any, and the raw weights beside it."""
        raw = self._evaluate(self._state.variables)
        figures, beside = raw, {}
        if self._state.average is not None:
            figures = self._evaluate(self._state.average)
            beside = {f"raw_{name}": value for name, value in _means(raw).items()}
        epoch = round(self._timeline.epochs_done(self._step), 4)
        if record:
            self._writers.write(self._step, "validation", {"epoch": epoch, **_means(figures), **beside})
        self._scores[self._step] = score_figures(figures, self._metric)
        raw_note = f"  (raw weights: {describe_score(raw, self._metric)})" if beside else ""
        best = show_score(max(self._scores.values()), self._metric)
        print_status(f"epoch {epoch:.1f}  validation: {describe_figures(figures)}  (best {best}){raw_note}")
        return {"step": self._step, **figures}

    def _has_stalled(self) -> bool:
        """Returns whether validation has not improved for config.train.patience_epochs, by the reports alone."""
        patience = self._experiment.config.train.patience_epochs
        if self._step not in self._scores or self._step == self._timeline.total_steps:
            return False
        if (best := self._timeline.stalled_since(self._scores, patience)) is None:
            return False
        metric, score = METRIC_WORDS[self._metric], show_score(self._scores[best], self._metric)
        print_status(
            f"stopping early after step {self._step}: no better {metric} for {patience:g} epochs, since step {best} "
            f"({score})"
        )
        return True

    def _evaluate(self, variables: dict[str, Any]) -> dict[str, float]:
        data = self._experiment.data
        counts = evaluate(
            self._eval_step,
            variables,
            self._watchdog.each(data.eval_batches(), "evaluating"),
            self._experiment.mesh,
            examples=len(data.eval_source),
            batch_count=data.eval_batch_count,
        )
        return figures_of(counts) | (figures_by_class(counts) if self._counts_by_class else {})

    @property
    def _counts_by_class(self) -> bool:
        return self._metric in NEED_CONFUSION and not self._experiment.many_labels


def _announce(experiment: Experiment) -> None:
    config, data, timeline = experiment.config, experiment.data, experiment.timeline
    steps = f"{timeline.total_steps} steps, {timeline.steps_per_epoch:.1f} an epoch"
    print_status(f"{config.model.name} on {config.data.name}: {steps}")
    if data.eval_split != config.data.eval_split:
        held_out, rest = len(data.eval_source), len(data.train_source)
        print_status(f"no folder for validation: {held_out} images are held out, {rest} are for training")


def _means(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != "examples"}


def _check_dataset(experiment: Experiment, workdir: str) -> tuple[Identity, bool]:
    """Returns the data set's identity, and whether the newest checkpoint, if any, has the same classes."""
    steps = finished_steps(os.path.join(workdir, "checkpoints"))
    saved = read_identity(workdir, steps[-1]) if steps else None
    where = f"step {steps[-1]} of {workdir}" if steps else ""
    if experiment.config.model.pretrained and not steps:
        experiment.data.check_weights(experiment.config.model.pretrained)
    current = experiment.data.check_same(saved, where, train=True)
    return current, saved is not None and (not saved["splits"] or saved["classes"] == current["classes"])


def train(experiment: Experiment, workdir: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Trains in `workdir`, from its newest undamaged checkpoint where there is one.

    `defaults` are all settings with their defaults, nested, for keys that an older run in `workdir` lacks. Returns
    {"step", "examples", "loss", "top1", "top5"} of the validation at the end.

    Raises:
        Preempted: SIGTERM or Ctrl-C; the state is saved.
        UserError: a mistake that the user can fix, or a full disk.
    """
    experiment.check(workdir, starts=not finished_steps(os.path.join(workdir, "checkpoints")))
    profile = Profile(experiment.config.profile, workdir, experiment.timeline.total_steps)
    with only_run_in(workdir) as check_workdir, report_full_disk(workdir), StopRequest() as stop:
        dataset, same_classes = _check_dataset(experiment, workdir)
        read_metrics(workdir)  # reports damage before anything is compiled
        claim_workdir(workdir, experiment.config, defaults)
        write_labels(workdir, dataset["classes"], keep_others=same_classes)
        watchdog = Watchdog(workdir, experiment.config.train.stall_secs)
        trainer = Trainer(experiment, workdir, stop, watchdog, profile, dataset, check_workdir)
        try:
            with watchdog:
                figures = trainer.run()
        except Preempted:
            trainer.close()
            raise
        except BaseException:
            processes.try_for(_CLOSING_SECS, trainer.close)
            raise
        trainer.close()
        if processes.is_first():
            print_status(describe_checkpoints(workdir, experiment.best_metric))
        by_class = NEED_CONFUSION if "top1" in figures else ()
        return {name: value for name, value in figures.items() if name not in by_class}
