"""How arrays lie on the devices: the batch split over one data axis, the state on every device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from densenet_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over `devices`, by default over all devices of all processes."""
    chosen = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(chosen, (DATA_AXIS,), axis_types=(AxisType.Auto,))


def over_data(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices, the others whole."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(key: str, global_batch_size: int, mesh: Mesh) -> None:
    """Checks that the devices of a mesh divide a batch evenly; see `check_divides`."""
    check_divides(key, global_batch_size, mesh.size)


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
    """Puts this process's share of a global batch onto its devices; the arrays returned are global."""
    sharding = over_data(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def with_sharding(abstract: Any, sharding: NamedSharding) -> Any:
    """The same tree of shapes and dtypes, each leaf to be laid out by `sharding`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
