"""StableHLO through jax.export: one file for CPU, CUDA and TPU, run by `jax.export.deserialize(bytes).call`."""

from collections.abc import Callable

import jax
import numpy as np
from jax import export

from densenet_jax.export.graph import Graph

PLATFORMS = ("cpu", "cuda", "tpu")


def write(graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None:
    """Writes the serialized program with its weights."""
    del precision, representative
    batch = graph.batch_size or "b"
    shape = export.symbolic_shape(f"{batch}, {', '.join(map(str, graph.image_shape))}")
    exported = export.export(jax.jit(graph.function), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct(shape, graph.input_dtype)
    )
    with open(path, "wb") as file:
        file.write(exported.serialize())


def load(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the program as a function of images."""
    with open(path, "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    compiled = jax.jit(exported.call)
    return lambda images: np.asarray(compiled(images))
