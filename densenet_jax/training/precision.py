"""Precision policies by name, and the dynamic loss scaling that float16 needs.

Parameters, running statistics, losses and optimizer state are float32 under every policy; the policy sets the dtype of
activations and matrix products.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from densenet_jax.choices import DTYPES
from densenet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Policy:
    """A precision policy; float16 scales the loss because its gradients underflow."""

    name: str
    compute_dtype: Any
    scales_loss: bool


POLICIES = {name: Policy(name, getattr(jnp, name), scales_loss=name == "float16") for name in DTYPES}


def get_policy(name: str) -> Policy:
    """Looks up a policy; float64 is for comparing runs on devices that sum in different orders.

    Raises:
        UserError: the name is unknown; or it is float64, and JAX was started without x64.
    """
    if name not in POLICIES:
        raise UserError(f"config.model.dtype is {name!r}; expected one of {', '.join(POLICIES)}.")
    if name == "float64" and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise UserError(
            "config.model.dtype is 'float64', which JAX rounds to float32 by default; set "
            "JAX_ENABLE_X64=1 in the environment."
        )
    return POLICIES[name]


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

    def update(
        self,
        finite: Bool[Array, ""],
        *,
        growth_interval_steps: int = 2000,
        smallest: float = 1.0,
        largest: float = 2.0**24,
    ) -> "LossScale":
        """Halves the scale after a skipped step; doubles it after `growth_interval_steps` good ones in a row."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grows = good >= growth_interval_steps
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(
            scale=jnp.clip(self.scale * factor, smallest, largest),
            good_steps=jnp.where(grows, 0, good),
            skipped_steps=self.skipped_steps + jnp.where(finite, 0, 1),
        )


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Returns whether every number of every leaf is finite."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def select(use_new: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Selects the tree `new` if `use_new`, else `old`, without branching."""
    return jax.tree.map(lambda a, b: jnp.where(use_new, a, b), new, old)
