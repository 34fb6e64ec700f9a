"""What a training run is at one moment: described abstractly first, then made where it will live."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from densenet_jax.training.rng import Purpose, step_key
from densenet_jax.training.sharding import with_sharding


@flax.struct.dataclass
class TrainState:
    """Parameters, statistics and optimizer state after `step` steps; with the seed, all that a run is."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, image_shape: tuple[int, int, int]
) -> TrainState:
    """The state before the first step, a pure function of the seed.

    Args:
        model: called as `model.init(key, images, train=False)`.
        optimizer: any optax transformation.
        seed: the run's seed.
        image_shape: height, width and channels that the model is trained on.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    return state_of(model.init(step_key(seed, Purpose.INIT, 0), images, train=False), optimizer)


def state_of(variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step of a run that starts from `variables`, {"params", "batch_stats"}."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, int, int],
    sharding: NamedSharding,
) -> TrainState:
    """Shapes, dtypes and layout of the state without any memory."""
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, seed, image_shape))
    return with_sharding(shapes, sharding)


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, int, int],
    sharding: NamedSharding,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """The state before the first step, made directly where `sharding` says.

    Args:
        model: as in `init_state`.
        optimizer: as in `init_state`.
        seed: the run's seed.
        image_shape: as in `init_state`.
        sharding: of every array.
        variables: {"params", "batch_stats"} to start from instead of random ones.
    """
    if variables is None:
        return jax.jit(lambda: init_state(model, optimizer, seed, image_shape), out_shardings=sharding)()
    return jax.jit(lambda given: state_of(given, optimizer), out_shardings=sharding)(variables)
