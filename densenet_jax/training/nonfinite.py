"""Finds where numbers stopped being finite: flags computed in the step, and a description of them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from densenet_jax.dtypes import wide
from densenet_jax.kernels.cpu.elementwise import are_usable, square_sums


def not_finite(tree: Any) -> Bool[Array, " n"]:
    """Flags each leaf whose sum of squares is not finite, in the order of `jax.tree.leaves`.

    The gradient's norm needs these sums too, so the compiler computes them once.
    """
    leaves = jax.tree.leaves(tree)
    return ~jnp.isfinite(_square_sums(leaves)) if leaves else jnp.zeros((0,), bool)


def tree_norm(tree: Any) -> Float[Array, ""]:
    """Computes the norm over all leaves."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(jnp.sum(_square_sums(leaves))) if are_usable(leaves) else optax.tree.norm(tree)


def _square_sums(leaves: list[Array]) -> Float[Array, " n"]:
    if are_usable(leaves):
        return square_sums(leaves)
    return jnp.stack([jnp.sum(jnp.square(leaf.astype(wide(leaf.dtype)))) for leaf in leaves])


def leaf_names(tree: Any) -> list[str]:
    """Returns the path of every leaf, "block/layer/kernel", in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def describe(what: str, flags: Bool[Array | np.ndarray, " n"], names: list[str]) -> str:
    """Describes which flags are set: "3 of 70 parameters, first conv0/kernel"; "" if none is.

    `what` is the leaves' kind, such as "parameters"; `names` come from `leaf_names` for the same tree. The first is by
    name, numbers as numbers.
    """
    faulty = sorted((name for name, flag in zip(names, flags, strict=True) if flag), key=_natural)
    return f"{len(faulty)} of {len(names)} {what}, first {faulty[0]}" if faulty else ""


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
