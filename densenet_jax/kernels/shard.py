"""Runs kernels on each device for its own part of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array


def own_groups(mesh: Mesh | None, groups: int) -> int:
    """Returns how many groups that share statistics each device has; 1 where a group is spread over devices."""
    return groups if mesh is None else max(groups // mesh.size, 1)


def on_each_device(
    function: Callable[..., tuple[Array, ...]],
    mesh: Mesh | None,
    groups: int,
    by_example: tuple[bool, ...],
    results: tuple[str, ...],
) -> Callable[..., Any]:
    """Makes a function run on each device for its own examples: arrays are divided along their first axis.

    Args:
        mesh: has one axis, which divides the examples; None and a single device change nothing.
        by_example: which operands are divided; the others are whole on every device.
        results: "example" is divided as well; "group" has a row for each group, "whole" is a sum over all examples.
    """
    if mesh is None or mesh.size == 1:
        return functools.partial(function, groups=groups)
    (axis,) = mesh.axis_names
    divided, whole = PartitionSpec(axis), PartitionSpec()
    is_divided = {"example": True, "group": groups > 1, "whole": False}

    def own_part(*operands: Array) -> tuple[Array, ...]:
        parts = function(*operands, groups=own_groups(mesh, groups))
        return tuple(
            part if is_divided[kind] else lax.psum(part, axis) for part, kind in zip(parts, results, strict=True)
        )

    return jax.shard_map(
        own_part,
        mesh=mesh,
        in_specs=tuple(divided if own else whole for own in by_example),
        out_specs=tuple(divided if is_divided[kind] else whole for kind in results),
        check_vma=False,
    )
