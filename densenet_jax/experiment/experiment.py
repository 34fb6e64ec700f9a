"""Makes the parts of one run from the settings, each on first use."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from densenet_jax.data.identity import read_identity
from densenet_jax.data.pipeline import check_repeats
from densenet_jax.errors import UserError
from densenet_jax.experiment.augmentation import augment_of, normalize_with
from densenet_jax.experiment.data import Data
from densenet_jax.experiment.optimization import loss_of, optimizer_of, schedule_of
from densenet_jax.kernels.select import check_wanted
from densenet_jax.models.create import create_model
from densenet_jax.models.pretrained import load_pretrained
from densenet_jax.models.variants import Variant, get_variant
from densenet_jax.system.console import print_status
from densenet_jax.system.disk import check_room
from densenet_jax.training import sharding
from densenet_jax.training.best_metric import BEST_METRICS
from densenet_jax.training.checkpoint import find_checkpoint
from densenet_jax.training.eval_step import EvalSums, make_eval_step, make_logits_step, make_predict_step
from densenet_jax.training.losses import Loss
from densenet_jax.training.precision import Policy, get_policy
from densenet_jax.training.restore import check_same_shapes, restore_variables
from densenet_jax.training.schedules import Schedule
from densenet_jax.training.state import StateRecipe, TrainState
from densenet_jax.training.steps import Augment, TrainStep
from densenet_jax.training.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Parts of one run. Files are opened and programs compiled on first use."""

    config: Any  # an ml_collections.FrozenConfigDict that `densenet_jax.config.check_config` has checked
    # Chips to only compile for, which needs no data set either; None: the devices of all processes.
    absent_devices: tuple[jax.Device, ...] | None = None
    head_classes: int = 0  # classes of the head without a data set; 0: the data set's own

    @functools.cached_property
    def variant(self) -> Variant:
        """Row of the model in the table of variants."""
        return get_variant(self.config.model.name)

    @functools.cached_property
    def data(self) -> Data:
        """Splits and their batches."""
        return Data(self.config, self.variant.preprocessing_of(self.config.model.pretrained))

    @functools.cached_property
    def timeline(self) -> Timeline:
        """Steps at which something is due."""
        if self.absent_devices is not None:
            return self.timeline_of(self.data.count_train_examples()[0])
        return self.timeline_of(len(self.data.train_source))

    def timeline_of(self, examples: int) -> Timeline:
        """Makes the timeline of training on this number of images."""
        config = self.config
        return Timeline(
            examples=examples,
            global_batch_size=config.train.global_batch_size,
            epochs=config.train.epochs,
            eval_every_epochs=config.eval.every_epochs,
            save_every_steps=config.checkpoint.every_steps,
            report_every_steps=config.train.log_every_steps,
        )

    @functools.cached_property
    def num_classes(self) -> int:
        """Classes of the head: the data set's own.

        Raises:
            UserError: another number was asked for.
        """
        if self.head_classes:
            return self.head_classes
        config = self.config
        planned = self.absent_devices is not None
        asked = config.model.num_classes
        count = self.data.count_classes() if planned else self.data.eval_source.num_classes
        if asked and asked != count:
            raise UserError(
                f"config.model.num_classes is {asked}, but {config.data.name} has {count} classes; "
                "set it to 0 to take the data set's own."
            )
        return count

    @functools.cached_property
    def policy(self) -> Policy:
        """Precision policy."""
        return get_policy(self.config.model.dtype)

    @functools.cached_property
    def model(self) -> nn.Module:
        """Flax module."""
        config = self.config
        return create_model(
            config.model.name,
            num_classes=self.num_classes,
            dtype=self.policy.compute_dtype,
            classifier_dropout=config.model.classifier_dropout,
            layer_dropout=config.model.layer_dropout,
            drop_path_rate=config.model.drop_path,
            remat=config.model.remat,
            block_form=self._block_form,
            kernels=config.model.kernels,
            mesh=self._all_devices,
            batch_norm_momentum=config.model.batch_norm_momentum,
            batch_norm_epsilon=config.model.batch_norm_epsilon or None,
            batch_norm_group_size=config.model.batch_norm_group_size,
            unbiased_running_variance=config.model.unbiased_running_variance,
            frozen_norms=config.optim.freeze,
            **self.architecture,
        )

    @property
    def architecture(self) -> dict[str, Any]:
        """Differences from the variant's own architecture, as `create_model` takes them."""
        config = self.config
        changes = {"growth_rate": config.model.growth_rate, "block_sizes": tuple(config.model.block_sizes)}
        return {name: value for name, value in changes.items() if value}

    @property
    def _block_form(self) -> str:
        """Implementation of dense blocks, for the planned chips where it depends on the chip."""
        form = self.config.model.block_form
        return f"{form}_{self._platform}" if self.absent_devices and form == "normalize_once" else form

    @property
    def _platform(self) -> str:
        """Platform of the chips: "cpu", "tpu" or "gpu"."""
        platform = (self.absent_devices or jax.devices())[0].platform
        return platform if platform in ("cpu", "tpu") else "gpu"

    def check_kernels(self) -> None:
        """Checks that the kernels asked for exist for training.

        Raises:
            UserError: they don't, on these chips or in this precision.
        """
        check_wanted(self.config.model.kernels, self._platform, self.policy.compute_dtype)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Learning rate as a function of the step."""
        return self.schedule_of(self.timeline)

    def schedule_of(self, timeline: Timeline) -> Schedule:
        """Makes the learning rate as a function of the step for this timeline."""
        return schedule_of(self.config, timeline)

    @functools.cached_property
    def loss(self) -> Loss:
        """Training loss; without a data set, class weights are counted as equal."""
        absent = self.absent_devices is not None
        train_labels = (lambda: np.arange(self.num_classes)) if absent else (lambda: self.data.train_source.labels())
        return loss_of(self.config, self.num_classes, train_labels)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Optax optimizer."""
        return optimizer_of(self.config, self.schedule)

    @functools.cached_property
    def _all_devices(self) -> Mesh:
        """The mesh regardless of batch sizes: models are also made where nothing is trained."""
        absent = self.absent_devices
        return sharding.make_mesh(None if absent is None else list(absent))

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Mesh of all devices of all processes along one data axis, which must divide the batches."""
        mesh = self._all_devices
        sharding.check_batch_size("config.train.global_batch_size", self.config.train.global_batch_size, mesh)
        sharding.check_batch_size("config.eval.batch_size", self.data.eval_batch_size, mesh)
        check_repeats(self.config.train.global_batch_size, self.config.augment.repeats)
        return mesh

    @functools.cached_property
    def layout(self) -> sharding.Layout:
        """Sharding of each array of the state."""
        return sharding.layout_of(self.config.train.sharding, self.mesh)

    @functools.cached_property
    def state_recipe(self) -> StateRecipe:
        """Recipe of the initial state."""
        return StateRecipe(
            self.model,
            self.optimizer,
            self.config.seed,
            self.data.train_shape,
            averages=self.config.train.average_decay > 0,
            scales_loss=self.policy.scales_loss,
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and layout of the state."""
        return self.state_recipe.abstract(self.layout)

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

    @property
    def many_labels(self) -> bool:
        """Whether images have many labels, each present, absent or unknown, instead of one class."""
        return self.config.data.labels == "multi"

    @property
    def best_metric(self) -> str:
        """Validation metric of the best checkpoint, one of `BEST_METRICS`.

        Raises:
            UserError: `config.checkpoint.best_metric` is for other labels, or needs one right class an image.
        """
        labels = self.config.data.labels
        asked, metrics = self.config.checkpoint.best_metric, BEST_METRICS[labels]
        if asked and asked not in metrics:
            raise UserError(
                f"config.checkpoint.best_metric is {asked!r}, but config.data.labels is {labels!r}; "
                f"expected {', '.join(metrics)} or empty for {next(iter(metrics))}."
            )
        return asked or next(iter(metrics))

    @property
    def mixes(self) -> bool:
        """Whether training examples are mixtures, on which accuracy is naturally low."""
        return bool(self.config.augment.mixup_alpha or self.config.augment.cutmix_alpha)

    @functools.cached_property
    def augment(self) -> Augment:
        """Augmentation of a batch of images and labels as a function of the step."""
        return augment_of(self.config, self.data.mean_std(), self.num_classes, self.policy.compute_dtype)

    def compile_train_step(self) -> Callable[[TrainState, dict[str, jax.Array]], Any]:
        """Compiles the training step for this mesh; its state argument is donated."""
        return self.lower_train_step().compile()

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
        batch = self._abstract_batch(config.train.global_batch_size, self.data.train_shape, self._train_bits)
        everywhere = sharding.replicated(self.mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(sharding.shardings_of(self.abstract_state), everywhere))
        return jitted.lower(self.abstract_state, batch)

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
        normalize = normalize_with(self.data.mean_std(), self.policy.compute_dtype)
        step = make_eval_step(self.model, normalize, classes=self.data.allowed_classes, confusion=confusion)
        over_data = sharding.over_data(self.mesh)
        dtypes = {
            "image": self.data.eval_transform().dtype,
            "label": jnp.float32 if self.many_labels else jnp.int32,
            "mask": jnp.bool_,
            "label_set": jnp.bool_,
        }
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtypes[name], sharding=over_data)
            for name, shape in self.data.eval_batch_shapes.items()
        }
        jitted = jax.jit(step, out_shardings=sharding.replicated(self.mesh))
        return jitted.lower(self._abstract_variables(), batch).compile()

    def compile_predict_step(self) -> Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]:
        """Makes the step that returns the probabilities of every example, compiled on first use."""
        normalize = normalize_with(self.data.mean_std(), self.policy.compute_dtype)
        step = make_predict_step(self.model, normalize, classes=self.data.allowed_classes, many_labels=self.many_labels)
        return jax.jit(step, out_shardings=sharding.replicated(self.mesh))

    def compile_logits_step(self) -> Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]:
        """Makes the step that returns the logits of every example, compiled on first use."""
        normalize = normalize_with(self.data.mean_std(), self.policy.compute_dtype)
        step = make_logits_step(self.model, normalize, classes=self.data.allowed_classes)
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

    @property
    def _train_bits(self) -> int:
        """Bits of a pixel; when planning, 8 unless a pixel range is set, since the data set need not be here."""
        return 8 if self.absent_devices is not None and not self.config.data.pixel_range else self.data.train_bits

    def _abstract_batch(
        self, size: int, image_shape: tuple[int, int, int], bits: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        over_data = sharding.over_data(self.mesh)
        pixel = jnp.uint16 if bits == 16 else jnp.uint8
        return {
            "image": jax.ShapeDtypeStruct((size, *image_shape), pixel, sharding=over_data),
            "label": self._abstract_labels(size),
        }

    def _abstract_labels(self, size: int) -> jax.ShapeDtypeStruct:
        shape, dtype = ((size, self.num_classes), jnp.float32) if self.many_labels else ((size,), jnp.int32)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.over_data(self.mesh))

    def _variable_shapes(self) -> Any:
        images = jnp.zeros((1, *self.data.train_shape))
        shapes = jax.eval_shape(lambda key: self.model.init(key, images, train=False), jax.random.key(0))
        return {"batch_stats": {}, **shapes}  # {} where the model has none

    def _abstract_variables(self) -> dict[str, Any]:
        return sharding.with_sharding(self._variable_shapes(), self.layout)

    def _laid_out(self, variables: dict[str, Any]) -> dict[str, Any]:
        return jax.device_put(variables, sharding.shardings_of(sharding.with_sharding(variables, self.layout)))
