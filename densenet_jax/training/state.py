"""The training state: described abstractly first, then created where it will live."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding

from densenet_jax.rng import Purpose, step_key
from densenet_jax.training.precision import LossScale
from densenet_jax.training.sharding import Layout, shardings_of, with_sharding


@flax.struct.dataclass
class TrainState:
    """Parameters, statistics and optimizer state after `step` steps; with the seed they determine the run.

    Attributes:
        step: steps done, skipped ones included.
        average: {"params", "batch_stats"} averaged over steps; None if the run keeps no average.
        loss_scale: None if the precision needs none.
    """

    step: Any  # int32[]; untyped like the rest, since trees of this form also hold shapes, layouts and names
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = None
    loss_scale: Any = None  # a LossScale

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class StateRecipe:
    """Makes the initial state, a pure function of the seed; `image_shape` is height, width and channels."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    seed: int
    image_shape: tuple[int, int, int]
    averages: bool = False
    scales_loss: bool = False

    def init_variables(self) -> Any:
        """Draws {"params", "batch_stats"}."""
        images = jnp.zeros((1, *self.image_shape), jnp.float32)
        return self.model.init(step_key(self.seed, Purpose.INIT, 0), images, train=False)

    def start_from(self, variables: Any) -> TrainState:
        """Makes the initial state from `variables`, {"params", "batch_stats"}."""
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=self.optimizer.init(params),
            # A copy: the state is donated whole, and no buffer may be donated twice.
            average=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if self.averages else None,
            loss_scale=LossScale.create() if self.scales_loss else None,
        )

    def abstract(self, sharding: NamedSharding | Layout) -> TrainState:
        """Describes shapes, dtypes and layout of the state, using no memory."""
        return with_sharding(jax.eval_shape(lambda: self.start_from(self.init_variables())), sharding)

    def create(self, sharding: NamedSharding | Layout, variables: Any = None) -> TrainState:
        """Creates the state where `sharding` puts it, from `variables` if given."""

        def begin(variables: Any) -> TrainState:
            return self.start_from(self.init_variables() if variables is None else variables)

        where = shardings_of(with_sharding(jax.eval_shape(begin, variables), sharding))
        return jax.jit(begin, out_shardings=where)(variables)
