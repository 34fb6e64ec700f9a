"""Where a number stopped being finite: flags from the step, words for a person."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool


def not_finite(tree: Any) -> Bool[Array, " n"]:
    """One flag a leaf, in the order of `jax.tree.leaves`: whether the sum of its squares is infinite or no number.

    The same sums make up the gradient's norm, so the compiler computes them once.
    """
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(tree)]
    sums = [jnp.sum(jnp.square(leaf)) for leaf in wide]
    return ~jnp.isfinite(jnp.stack(sums)) if sums else jnp.zeros((0,), bool)


def leaf_names(tree: Any) -> list[str]:
    """The path of every leaf, "block/layer/kernel", in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def describe(what: str, flags: Bool[Array | np.ndarray, " n"], names: list[str]) -> str:
    """How many flags are up and where: "3 of 70 parameters, first conv0/kernel"; "" where none is.

    Args:
        what: what has the names, such as "parameters".
        flags: of `not_finite`.
        names: of `leaf_names` for the same tree. The first is the first of these by name, numbers as numbers.
    """
    found = sorted((name for name, flag in zip(names, flags, strict=True) if flag), key=_natural)
    return f"{len(found)} of {len(names)} {what}, first {found[0]}" if found else ""


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
