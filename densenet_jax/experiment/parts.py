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

from densenet_jax.augment.basic import normalize
from densenet_jax.dtypes import DType
from densenet_jax.errors import UserError
from densenet_jax.experiment.augmentation import augment_of
from densenet_jax.experiment.data import Data
from densenet_jax.experiment.optimization import loss_of, optimizer_of, schedule_of
from densenet_jax.kernels.select import check_wanted
from densenet_jax.models.create import create_model
from densenet_jax.models.variants import Variant, get_variant
from densenet_jax.training import sharding
from densenet_jax.training.best_metric import BEST_METRICS
from densenet_jax.training.losses import Loss
from densenet_jax.training.precision import get_dtype
from densenet_jax.training.schedules import Schedule
from densenet_jax.training.state import StateRecipe, TrainState
from densenet_jax.training.steps import Augment
from densenet_jax.training.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Parts:
    """Parts of one run; files are opened on first use."""

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
        """Steps at which something is due; without the data set, by its known size."""
        config = self.config
        return Timeline(
            examples=self.data.count_train_examples()[0],
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
        config, count = self.config, self.data.count_classes()
        asked = config.model.num_classes
        if asked and asked != count:
            raise UserError(
                f"config.model.num_classes is {asked}, but {config.data.name} has {count} classes; "
                "set it to 0 to take the data set's own."
            )
        return count

    @functools.cached_property
    def dtype(self) -> DType:
        """Dtype of activations, and of products unless these are of integers."""
        return get_dtype("float32" if self._is_int8 else self.config.model.dtype)

    @property
    def _is_int8(self) -> bool:
        return self.config.model.dtype == "int8"

    @functools.cached_property
    def model(self) -> nn.Module:
        """Flax module."""
        config, form = self.config, self.config.model.block_form
        if self.absent_devices and form == "normalize_once":
            form = f"{form}_{self._platform}"
        return create_model(
            config.model.name,
            num_classes=self.num_classes,
            dtype=jnp.int8 if self._is_int8 else self.dtype,
            classifier_dropout=config.model.classifier_dropout,
            layer_dropout=config.model.layer_dropout,
            drop_path_rate=config.model.drop_path,
            remat=config.model.remat,
            block_form=form,
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
    def _platform(self) -> str:
        """Platform of the chips: "cpu", "tpu" or "gpu"."""
        platform = (self.absent_devices or jax.devices())[0].platform
        return platform if platform in ("cpu", "tpu") else "gpu"

    def check_kernels(self) -> None:
        """Checks that the kernels asked for exist for training.

        Raises:
            UserError: they don't, on these chips or in this precision.
        """
        if self._is_int8:
            raise UserError(
                "config.model.dtype is 'int8', in which networks are evaluated but not trained; train in float32 or "
                "bfloat16, and set it for --mode predict, serve or eval."
            )
        check_wanted(self.config.model.kernels, self._platform, self.dtype)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Learning rate as a function of the step."""
        return schedule_of(self.config, self.timeline)

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
        sharding.check_divides("config.train.global_batch_size", self.config.train.global_batch_size, mesh.size)
        sharding.check_divides("config.eval.batch_size", self.data.eval_batch_size, mesh.size)
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
            scales_loss=self.config.model.dtype == "float16",
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and layout of the state."""
        return self.state_recipe.abstract(self.layout)

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

    @functools.cached_property
    def normalize(self) -> Callable[[jax.Array], jax.Array]:
        """Function from bytes to normalized floats, as in evaluation."""
        mean, std = self.data.mean_std()
        return functools.partial(normalize, mean=mean, std=std, dtype=self.dtype)

    @functools.cached_property
    def augment(self) -> Augment:
        """Augmentation of a batch of images and labels as a function of the step."""
        return augment_of(self.config, *self.data.mean_std(), self.num_classes, self.dtype)
