"""What kernels and their twins compute in."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """What is summed and scaled in: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)
