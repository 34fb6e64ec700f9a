"""Writes a network with drawn weights to an ONNX file that gives logits; needs JAX and the export extra.

python benchmarks/versus/onnx_export.py densenet121 densenet121.onnx --image_size_px 224 --channels 3
"""

from __future__ import annotations

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax_worker import draw_variables

import densenet_jax
from densenet_jax.data.transforms import eval_transform
from densenet_jax.export import onnx as export_onnx
from densenet_jax.export.graph import make_graph
from densenet_jax.predict.model import Deployed


def main() -> None:
    """Writes the file unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("path")
    parser.add_argument("--image_size_px", type=int, required=True)
    parser.add_argument("--channels", type=int, required=True)
    parser.add_argument("--block_sizes", type=int, nargs="+")
    parser.add_argument("--precision", choices=("float32", "int8"), default="float32")
    arguments = parser.parse_args()
    overrides = {"block_sizes": tuple(arguments.block_sizes)} if arguments.block_sizes else {}
    network = densenet_jax.create_model(arguments.model, **overrides)
    size_px, channels = arguments.image_size_px, arguments.channels
    variables = draw_variables(network, jnp.zeros((1, size_px, size_px, channels)), np.random.default_rng(0))
    classes = jax.eval_shape(
        lambda variables, images: network.apply(variables, images, train=False),
        variables,
        jax.ShapeDtypeStruct((1, size_px, size_px, channels), jnp.float32),
    ).shape[-1]
    model = Deployed(
        name=arguments.model,
        source="drawn weights",
        module=network,
        variables=variables,
        transform=eval_transform(image_size_px=size_px, resize_px=size_px, channels=channels),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        dtype=jnp.float32,
        class_names=tuple(str(number) for number in range(classes)),
    )
    graph = make_graph(model, preprocess=False)
    temporary = f"{arguments.path}.{os.getpid()}"
    try:
        pixels = np.random.default_rng(1).integers(0, 256, (16, size_px, size_px, channels), dtype=np.uint8)
        export_onnx.write(graph, temporary, arguments.precision, pixels)
        os.replace(temporary, arguments.path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


if __name__ == "__main__":
    main()
