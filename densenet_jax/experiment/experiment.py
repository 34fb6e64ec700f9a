"""Checks a run, loads its weights and compiles its steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from densenet_jax.data.identity import read_identity
from densenet_jax.errors import UserError
from densenet_jax.experiment.parts import Parts
from densenet_jax.models.fused.inference import PackedInCall
from densenet_jax.models.pretrained import load_pretrained
from densenet_jax.system.console import print_status
from densenet_jax.system.disk import check_room
from densenet_jax.system.host import release_freed_memory
from densenet_jax.training import sharding
from densenet_jax.training.eval_step import EvalSums, PredictStep, make_eval_step, make_logits_step, make_predict_step
from densenet_jax.training.restore import check_same_shapes, find_checkpoint, restore_variables
from densenet_jax.training.state import TrainState
from densenet_jax.training.steps import TrainStep


@dataclasses.dataclass(frozen=True)
class Experiment(Parts):
    """The parts of one run, its weights and its programs."""

    def check(self, workdir: str, *, starts: bool) -> None:
        """Checks everything that training needs, cheapest first, before anything is compiled or written.

        Args:
            workdir: where checkpoints will go; need not exist yet.
            starts: whether there is no checkpoint, so that pretrained weights are needed if the settings name some.

        Raises:
            UserError: the settings, the data, the weights or the machine are not as they should be.
        """
        self.data.check_batch()
        self.data.mean_std()
        self.check_kernels()
        self.best_metric, self.mesh, self.schedule, self.optimizer  # noqa: B018 - each checks its settings
        self.loss, self.model  # noqa: B018 - likewise
        if starts and self.config.model.pretrained:
            self._start_variables  # noqa: B018 - kept until the state is made
        leaves = jax.tree.leaves(self.abstract_state)
        check_room(workdir, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))

    def initial_state(self) -> TrainState:
        """Makes the state before the first step, from pretrained weights if the settings name some."""
        variables = self._start_variables if self.config.model.pretrained else None
        self.__dict__.pop("_start_variables", None)  # not in memory beside the state
        return self.state_recipe.create(self.layout, variables)

    @functools.cached_property
    def _start_variables(self) -> dict[str, Any]:
        return self.pretrained_variables()

    def pretrained_variables(self) -> dict[str, Any]:
        """Loads the weights of `config.model.pretrained`, with a new head if the classes differ.

        Raises:
            UserError: they can't be loaded, or belong to another model.
        """
        config = self.config
        self.data.check_weights(config.model.pretrained)
        print_status(f"reading the weights {config.model.pretrained}")
        variables = load_pretrained(
            config.model.name,
            config.model.pretrained,
            self.num_classes,
            channels=config.data.channels,
            head_seed=config.seed,
            average=config.model.pretrained_average,
            **self.architecture,
        )
        return self._laid_out(variables)

    def saved_variables(self, workdir: str) -> tuple[int, dict[str, Any]]:
        """Loads the step of `config.eval.checkpoint` and its weights, their moving average if the run keeps one.

        Raises:
            UserError: `workdir` has no such checkpoint, or it is of another model.
        """
        directory, step = find_checkpoint(workdir, str(self.config.eval.checkpoint), self.config.checkpoint.best_metric)
        self.data.check_same(read_identity(workdir, step), f"step {step} of {workdir}")
        variables = restore_variables(directory, step, sharding.replicated(self.mesh))
        self.check_fits(variables, f"{directory}/{step}")
        return step, self._laid_out(variables)

    def compile_train_step(self) -> Callable[[TrainState, dict[str, jax.Array]], Any]:
        """Compiles the training step for this mesh; its state argument is donated."""
        return _compile(self.lower_train_step())

    def lower_train_step(self) -> jax.stages.Lowered:
        """Traces the training step for this mesh, ready to be compiled."""
        config = self.config
        self.check_kernels()
        step = TrainStep(
            self.model,
            self.optimizer,
            self.augment,
            seed=config.seed,
            loss=self.loss,
            microbatches=config.train.microbatches,
            average_decay=config.train.average_decay,
            mesh=self.mesh if config.train.sharding == "fsdp" else None,
        )
        # When planning, 8 bits unless a pixel range is set, since the data set need not be here.
        is_planned = self.absent_devices is not None and not config.data.pixel_range
        pixel = jnp.uint8 if is_planned or self.data.train_bits != 16 else jnp.uint16
        batch = self._abstract_batch(config.train.global_batch_size, image=(self.data.train_shape, pixel))
        everywhere = sharding.replicated(self.mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(sharding.shardings_of(self.abstract_state), everywhere))
        return jitted.lower(self.abstract_state, batch)

    @property
    def _evaluated(self) -> Any:
        return PackedInCall(self.model, self.mesh.size)

    def compile_eval_step(
        self, *, confusion: bool = False
    ) -> Callable[[dict[str, Any], dict[str, jax.Array]], EvalSums]:
        """Compiles the evaluation step for this mesh; with `confusion` it counts predictions by class.

        Raises:
            UserError: images have several right classes, so predictions can't be counted by class.
        """
        if confusion and self.data.eval_source.label_sets:
            raise UserError(
                "config.eval.per_class_output, config.eval.confusion_output, and balanced_accuracy and f1 as "
                "config.checkpoint.best_metric expect one class an image, but "
                f"{self.config.data.name} has several; leave them empty."
            )
        step = make_eval_step(self._evaluated, self.normalize, classes=self.data.allowed_classes, confusion=confusion)
        transform = self.data.eval_transform()
        rows: dict[str, Any] = {"mask": ((), jnp.bool_)}
        if self.data.eval_source.label_sets:
            rows["label_set"] = ((self.num_classes,), jnp.bool_)
        batch = self._abstract_batch(self.data.eval_batch_size, image=(transform.shape, transform.dtype), **rows)
        jitted = jax.jit(step, out_shardings=sharding.replicated(self.mesh))
        return _compile(jitted.lower(sharding.with_sharding(self._variable_shapes(), self.layout), batch))

    def compile_predict_step(self) -> PredictStep:
        """Makes the step that returns the probabilities of every example, compiled on first use."""
        step = make_predict_step(
            self._evaluated, self.normalize, classes=self.data.allowed_classes, many_labels=self.many_labels
        )
        return jax.jit(step, out_shardings=sharding.replicated(self.mesh))

    def compile_logits_step(self) -> PredictStep:
        """Makes the step that returns the logits of every example, compiled on first use."""
        step = make_logits_step(self._evaluated, self.normalize, classes=self.data.allowed_classes)
        return jax.jit(step, out_shardings=sharding.replicated(self.mesh))

    def check_fits(self, variables: dict[str, Any], where: str) -> None:
        """Checks that restored variables fit this model.

        Raises:
            UserError: they don't; the message names the first difference.
        """
        what = f"{where} is of another model than {self.config.model.name} with {self.num_classes} classes"
        check_same_shapes(what, variables, self._variable_shapes(), "give the run's own --config")

    def published_beside(self, figures: dict[str, float]) -> list[str]:
        """Returns the published figures for the pretrained weights on this data set, a line a figure."""
        config = self.config
        lines = []
        for result in self.variant.results_of(config.model.pretrained):
            if result.dataset == config.data.name and result.preprocessing is not None:
                px, here = result.preprocessing.test_px, 100 * figures["top1"]
                lines.append(
                    f"published with one crop at {px} px ({result.source}): top-1 {result.top1:.3f}%; here, with "
                    f"{config.eval.crops} at {self.data.eval_shape[0]} px: {here:.3f}% ({here - result.top1:+.3f})"
                )
        return lines or [f"no published figure of {config.model.pretrained} on {config.data.name} is known"]

    def _abstract_batch(self, size: int, **rows: tuple[tuple[int, ...], Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Describes a global batch with the labels and the arrays that `rows` give the shape and dtype of a row of."""
        rows["label"] = ((self.num_classes,), jnp.float32) if self.many_labels else ((), jnp.int32)
        over_data = sharding.over_data(self.mesh)
        return {
            name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=over_data)
            for name, (shape, dtype) in rows.items()
        }

    def _variable_shapes(self) -> Any:
        images = jnp.zeros((1, *self.data.train_shape))
        shapes = jax.eval_shape(lambda key: self.model.init(key, images, train=False), jax.random.key(0))
        return {"batch_stats": {}, **shapes}  # {} where the model has none

    def _laid_out(self, variables: dict[str, Any]) -> dict[str, Any]:
        return jax.device_put(variables, sharding.shardings_of(sharding.with_sharding(variables, self.layout)))


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    compiled = lowered.compile()
    release_freed_memory()
    return compiled
