"""Lays arrays out on devices: the batch split over one data axis, the state replicated or split over the same axis."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from densenet_jax.errors import UserError

DATA_AXIS = "data"
_LARGE = 2**12  # elements; smaller arrays are not split, since the exchange costs more than the memory saves

# shape and dtype -> where such an array lies
Layout: TypeAlias = Callable[[jax.ShapeDtypeStruct], NamedSharding]


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Makes a one-axis mesh over `devices`, by default over all devices of all processes."""
    chosen = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(chosen, (DATA_AXIS,), axis_types=(AxisType.Auto,))


def over_data(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def layout_of(name: str, mesh: Mesh) -> Layout:
    """Returns the state layout for the setting "replicated" or "fsdp".

    The latter splits large arrays along the longest axis that the number of devices divides, and replicates the others:
    parameters and optimizer state take 1/devices of the memory on each device (ZeRO, arXiv:1910.02054; PyTorch's FSDP).
    A step gathers the parameters where it uses them.
    """

    def lay_out(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        fitting = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if name != "fsdp" or not fitting or math.prod(leaf.shape) < _LARGE:
            return replicated(mesh)
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, DATA_AXIS))

    return lay_out


def check_divides(key: str, global_batch_size: int, count: int) -> None:
    """Checks that `count` devices divide a batch evenly.

    Raises:
        UserError: they don't; the message names `key` and the nearest sizes that fit.
    """
    if global_batch_size % count:
        low = global_batch_size // count * count
        fits = f"{low} or {low + count}" if low else str(count)
        raise UserError(f"{key} is {global_batch_size}, which {count} devices don't divide; take {fits}.")


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's share of a global batch onto its devices; returns global arrays."""
    sharding = over_data(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def with_sharding(abstract: Any, sharding: NamedSharding | Layout) -> Any:
    """Adds each leaf's sharding to a tree of shapes and dtypes."""

    def laid_out(leaf: jax.ShapeDtypeStruct | jax.Array) -> jax.ShapeDtypeStruct:
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return shape.update(sharding=sharding if isinstance(sharding, NamedSharding) else sharding(shape))

    return jax.tree.map(laid_out, abstract)


def shardings_of(abstract: Any) -> Any:
    """Returns the tree of the leaves' shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
