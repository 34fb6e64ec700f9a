"""StableHLO through jax.export: one file for CPU, CUDA and TPU, run by `jax.export.deserialize(bytes).call`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export

from densenet_jax.export.graph import Graph
from densenet_jax.export.verify import Outputs, in_order

PLATFORMS = ("cpu", "cuda", "tpu")


def write(graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None:
    """Writes the serialized program with its weights; it returns an array, or with maps a dictionary of both."""
    del precision, representative
    batch = graph.batch_size or "b"
    shape = export.symbolic_shape(f"{batch}, {', '.join(map(str, graph.image_shape))}")

    def function(images: jax.Array) -> Any:
        outputs = graph.function(images)
        return dict(zip(graph.output_names, outputs, strict=True)) if graph.has_maps else outputs

    exported = export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, graph.input_dtype))
    with open(path, "wb") as file:
        file.write(exported.serialize())


def load(path: str) -> Callable[[np.ndarray], Outputs]:
    """Loads the program as a function of images."""
    with open(path, "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    compiled = jax.jit(exported.call)

    def call(images: np.ndarray) -> Outputs:
        outputs = jax.device_get(compiled(images))
        return in_order(outputs) if isinstance(outputs, dict) else (outputs,)

    return call
