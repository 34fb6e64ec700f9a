"""From checked settings to the parts of a run. The only place that knows them all, and that reads the settings."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from jax.sharding import Mesh

from densenet_jax.data.pipeline import Batches, eval_batches, train_batches
from densenet_jax.data.sources import Source, open_source
from densenet_jax.data.transforms import eval_transform, train_transform
from densenet_jax.errors import UserError
from densenet_jax.models.create import create_model
from densenet_jax.models.pretrained import load_pretrained
from densenet_jax.models.published import Preprocessing
from densenet_jax.models.variants import Variant, get_variant
from densenet_jax.training import augment, sharding
from densenet_jax.training.optimizer import make_optimizer
from densenet_jax.training.rng import Purpose, example_keys, step_key
from densenet_jax.training.schedules import make_schedule
from densenet_jax.training.state import TrainState, abstract_state, create_state
from densenet_jax.training.steps import make_eval_step, make_train_step
from densenet_jax.training.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of one run, each made on first use: an evaluation never opens the training split."""

    config: ml_collections.FrozenConfigDict

    @functools.cached_property
    def train_source(self) -> Source:
        """The records that are trained on."""
        config = self.config
        return open_source(config.data.name, config.data.dir, config.data.train_split)

    @functools.cached_property
    def eval_source(self) -> Source:
        """The records that are evaluated."""
        config = self.config
        return open_source(config.data.name, config.data.dir, config.data.eval_split)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the model is trained on."""
        side = self.config.data.image_size_px
        return side, side, self.config.data.channels

    def train_batches(self, start_step: int) -> Batches:
        """This process's shares of the global batches from `start_step` on, without end."""
        config = self.config
        transform = train_transform(
            kind=config.data.crop,
            image_size_px=config.data.image_size_px,
            channels=config.data.channels,
            area_range=config.data.crop_area,
            aspect_range=config.data.crop_aspect,
            interpolation=config.data.interpolation,
        )
        return train_batches(
            self.train_source,
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start_step,
            transform=transform,
            reader_threads=config.data.reader_threads,
            prefetch_batches=config.data.prefetch_batches,
        )

    def eval_batches(self) -> Batches:
        """This process's shares of the evaluated split, padded and masked."""
        config = self.config
        transform = eval_transform(
            image_size_px=self._eval_size_px,
            resize_px=round(self._eval_size_px / (config.eval.crop_fraction or self.preprocessing.crop_fraction)),
            channels=config.data.channels,
            interpolation=config.eval.interpolation or self.preprocessing.interpolation,
        )
        return eval_batches(
            self.eval_source,
            global_batch_size=self.eval_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            transform=transform,
            reader_threads=config.data.reader_threads,
            prefetch_batches=config.data.prefetch_batches,
        )

    @property
    def eval_batch_size(self) -> int:
        """Examples an evaluation step takes, over all devices."""
        return self.config.eval.batch_size or self.config.train.global_batch_size

    @property
    def eval_batch_count(self) -> int:
        """Batches of one evaluation."""
        return math.ceil(len(self.eval_source) / self.eval_batch_size)

    @property
    def _eval_size_px(self) -> int:
        return self.config.eval.image_size_px or self.config.data.image_size_px

    @functools.cached_property
    def timeline(self) -> Timeline:
        """What is due when."""
        config = self.config
        return Timeline(
            examples=len(self.train_source),
            global_batch_size=config.train.global_batch_size,
            epochs=config.train.epochs,
            eval_every_epochs=config.eval.every_epochs,
            save_every_steps=config.checkpoint.every_steps,
            report_every_steps=config.train.log_every_steps,
        )

    @functools.cached_property
    def variant(self) -> Variant:
        """The model's row in the table of variants."""
        return get_variant(self.config.model.name)

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images of the published weights were prepared, or of the variant where it starts from none."""
        return self.variant.preprocessing_of(self.config.model.pretrained)

    @functools.cached_property
    def num_classes(self) -> int:
        """Classes of the head: the data set's own, or as many as asked for.

        Raises:
            UserError: fewer were asked for than the data set has.
        """
        asked, found = self.config.model.num_classes, self.eval_source.num_classes
        if asked and asked != found:
            raise UserError(
                f"config.model.num_classes is {asked}, but {self.config.data.name} has {found} classes; "
                "set it to 0 to take the data set's own."
            )
        return found

    @functools.cached_property
    def model(self) -> nn.Module:
        """The flax module."""
        config = self.config
        return create_model(
            config.model.name,
            num_classes=self.num_classes,
            dtype=jnp.dtype(config.model.dtype),
            classifier_dropout=config.model.classifier_dropout,
            layer_dropout=config.model.layer_dropout,
            remat=config.model.remat,
            batch_norm_momentum=config.model.batch_norm_momentum,
            batch_norm_group_size=config.model.batch_norm_group_size,
            unbiased_running_variance=config.model.unbiased_running_variance,
        )

    @functools.cached_property
    def schedule(self) -> Callable[[Any], Any]:
        """The learning rate as a function of the step."""
        config = self.config
        return make_schedule(
            config.optim.schedule,
            learning_rate=config.optim.learning_rate,
            total_steps=self.timeline.total_steps,
            warmup_steps=config.optim.warmup_steps or self.timeline.steps_of(config.optim.warmup_epochs),
            milestone_steps=config.optim.milestone_steps
            or tuple(map(self.timeline.steps_of, config.optim.milestone_epochs)),
            milestone_rates=config.optim.milestone_rates,
            decay_factor=config.optim.decay_factor,
            end_learning_rate=config.optim.end_learning_rate,
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax chain."""
        config = self.config
        return make_optimizer(
            config.optim.name,
            self.schedule,
            momentum=config.optim.momentum,
            nesterov=config.optim.nesterov,
            weight_decay=config.optim.weight_decay,
            decay_norm_and_bias=config.optim.decay_norm_and_bias,
        )

    def _mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        config = self.config
        mean, std = config.data.mean or self.preprocessing.mean, config.data.std or self.preprocessing.std
        for key, values in (("config.data.mean", mean), ("config.data.std", std)):
            if len(values) != config.data.channels:
                raise UserError(
                    f"{key} has {len(values)} numbers {tuple(values)}, but config.data.channels is "
                    f"{config.data.channels}; give one number a channel."
                )
        return mean, std

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices of all processes along one data axis."""
        mesh = sharding.make_mesh()
        sharding.check_batch_size("config.train.global_batch_size", self.config.train.global_batch_size, mesh)
        sharding.check_batch_size("config.eval.batch_size", self.eval_batch_size, mesh)
        return mesh

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and layout of the state."""
        return abstract_state(
            self.model, self.optimizer, self.config.seed, self.image_shape, sharding.replicated(self.mesh)
        )

    def initial_state(self) -> TrainState:
        """The state before the first step, from pretrained weights where the settings name some."""
        return create_state(
            self.model,
            self.optimizer,
            self.config.seed,
            self.image_shape,
            sharding.replicated(self.mesh),
            self.pretrained_variables() if self.config.model.pretrained else None,
        )

    def pretrained_variables(self) -> dict[str, Any]:
        """The weights that `config.model.pretrained` names, with a new head where the classes differ.

        Raises:
            UserError: they can't be had, or are of another model.
        """
        config = self.config
        variables = load_pretrained(
            config.model.name,
            config.model.pretrained,
            self.num_classes,
            channels=config.data.channels,
            head_seed=config.seed,
        )
        return jax.device_put(variables, sharding.replicated(self.mesh))

    def compile_train_step(self) -> Callable[[TrainState, dict[str, jax.Array]], Any]:
        """The training step, compiled for this mesh; its state argument is donated."""
        step = make_train_step(
            self.model,
            self.optimizer,
            self._train_preprocess(),
            seed=self.config.seed,
            label_smoothing=self.config.train.label_smoothing,
        )
        batch_size = self.config.train.global_batch_size
        everywhere = sharding.replicated(self.mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere))
        return jitted.lower(self.abstract_state, self._abstract_batch(batch_size, self.image_shape)).compile()

    def compile_eval_step(self) -> Callable[[dict[str, Any], dict[str, jax.Array]], Any]:
        """The evaluation step, compiled for this mesh."""
        mean, std = self._mean_std()
        dtype = jnp.dtype(self.config.model.dtype)
        step = make_eval_step(self.model, lambda images: augment.normalize(images, mean, std, dtype))
        side = self._eval_size_px
        batch = self._abstract_batch(self.eval_batch_size, (side, side, self.config.data.channels))
        batch["mask"] = jax.ShapeDtypeStruct((self.eval_batch_size,), jnp.bool_, sharding=batch["label"].sharding)
        jitted = jax.jit(step, out_shardings=sharding.replicated(self.mesh))
        return jitted.lower(self._abstract_variables(), batch).compile()

    def check_fits(self, variables: dict[str, Any], where: str) -> None:
        """Checks that restored variables are this model's.

        Raises:
            UserError: they aren't; the message names the first difference.
        """
        ours, theirs = (
            {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
            for leaves in map(jax.tree_util.tree_leaves_with_path, (self._abstract_variables(), variables))
        )
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"{where} is of another model than {self.config.model.name} with {self.num_classes} classes: "
                    f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here; "
                    "give the run's own --config."
                )

    def _abstract_variables(self) -> dict[str, Any]:
        shapes = jax.eval_shape(
            lambda key: self.model.init(key, jnp.zeros((1, *self.image_shape)), train=False), jax.random.key(0)
        )
        return sharding.with_sharding(shapes, sharding.replicated(self.mesh))

    def _abstract_batch(self, size: int, image_shape: tuple[int, int, int]) -> dict[str, jax.ShapeDtypeStruct]:
        over_data = sharding.over_data(self.mesh)
        return {
            "image": jax.ShapeDtypeStruct((size, *image_shape), jnp.uint8, sharding=over_data),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=over_data),
        }

    def _train_preprocess(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        config = self.config
        mean, std = self._mean_std()
        dtype = jnp.dtype(config.model.dtype)

        def preprocess(images: jax.Array, step: jax.Array) -> jax.Array:
            def keys(purpose: Purpose) -> jax.Array:
                return example_keys(step_key(config.seed, purpose, step), images.shape[0])

            if config.data.flip:
                images = augment.random_flip(images, keys(Purpose.FLIP))
            if config.data.pad_px:
                images = augment.pad_and_crop(images, keys(Purpose.PAD_CROP), config.data.pad_px)
            return augment.normalize(images, mean, std, dtype)

        return preprocess
