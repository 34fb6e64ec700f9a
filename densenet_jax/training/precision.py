"""Precisions by name, and the dynamic loss scaling that float16 needs, since its gradients underflow.

Parameters, running statistics, losses and optimizer state are float32 in every precision, which is the dtype of
activations and matrix products.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from densenet_jax.dtypes import DType
from densenet_jax.errors import UserError

_GROWTH_INTERVAL_STEPS = 2000
_SMALLEST, _LARGEST = 1.0, 2.0**24


def get_dtype(name: str) -> DType:
    """Returns one of `choices.DTYPES`; float64 is for comparing runs on devices that sum in different orders.

    Raises:
        UserError: it is float64, and JAX was started without x64.
    """
    if name == "float64" and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise UserError(
            "config.model.dtype is 'float64', which JAX rounds to float32 by default; set "
            "JAX_ENABLE_X64=1 in the environment."
        )
    return getattr(jnp, name)


@flax.struct.dataclass
class LossScale:
    """Dynamic loss scaling (arXiv:1710.03740), with the constants of torch's GradScaler.

    A training step multiplies the loss by `scale`, divides the gradient by it and, if a gradient is not finite, keeps
    the old parameters, statistics and optimizer state and halves the scale:

        loss_scale.scale_loss(loss)                            # inside the function that is differentiated
        gradients = loss_scale.unscale(gradients)
        finite = all_finite(gradients)
        new_state = select(finite, new_state, old_state)
        loss_scale = loss_scale.update(finite)

    Attributes:
        scale: a power of two, so that scaling and unscaling round nothing.
        good_steps: finite steps since the scale last changed.
        skipped_steps: steps skipped in the whole run.
    """

    scale: Any  # float32[]; untyped, since trees of this form also hold shapes, layouts and names
    good_steps: Any  # int32[]
    skipped_steps: Any  # int32[]

    @classmethod
    def create(cls, initial: float = 2.0**16) -> "LossScale":
        """Creates the scale for the first step."""
        nothing = jnp.zeros((), jnp.int32)
        return cls(scale=jnp.asarray(initial, jnp.float32), good_steps=nothing, skipped_steps=nothing)

    def scale_loss(self, loss: Float[Array, "..."]) -> Float[Array, "..."]:
        """Multiplies the loss by the scale."""
        return loss * self.scale.astype(loss.dtype)

    def unscale(self, gradients: Any) -> Any:
        """Divides gradients of the scaled loss by the scale."""
        return jax.tree.map(lambda leaf: leaf * (1.0 / self.scale).astype(leaf.dtype), gradients)

    def update(self, finite: Bool[Array, ""]) -> "LossScale":
        """Halves the scale after a skipped step; doubles it after 2000 good ones in a row."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grows = good >= _GROWTH_INTERVAL_STEPS
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(
            scale=jnp.clip(self.scale * factor, _SMALLEST, _LARGEST),
            good_steps=jnp.where(grows, 0, good),
            skipped_steps=self.skipped_steps + jnp.where(finite, 0, 1),
        )


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Returns whether every number of every leaf is finite."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def select(use_new: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Selects the tree `new` if `use_new`, else `old`, without branching."""
    return jax.tree.map(lambda a, b: jnp.where(use_new, a, b), new, old)
