"""TFLite in float32, float16 weights or full int8, with TFLite's built-in operations only."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from densenet_jax.errors import UserError
from densenet_jax.export.graph import Graph
from densenet_jax.export.savedmodel import tensorflow_function
from densenet_jax.export.tflite_batch import open_batch


def write(graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None:
    """Writes the flatbuffer to `path`. Where the batch size stays open it is converted for one image, and opened.

    Args:
        graph: what is written.
        path: the file.
        precision: "float32"; "float16": weights of half the size, computed in float32 where the device has no float16;
            "int8": weights and activations, input bytes as they are where the preprocessing is inside.
        representative: int8: images uint8 [n, h, w, c] to take the activations' ranges from.
    """
    import tensorflow as tf

    if graph.allowed_classes is not None:
        raise UserError("config.eval.class_map is not for --format tflite; leave it empty.")
    whole = precision == "int8" and not graph.preprocessed  # bytes as quantised numbers: no operation is left in float
    dtype = np.float32 if whole else graph.input_dtype
    after = tf.nn.softmax if graph.output_name == "probabilities" else tf.identity
    function: Any = tensorflow_function(graph, graph.logits, dtype, graph.batch_size or 1, after)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], function)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        assert representative is not None
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = lambda: _batches(graph, representative)
        if whole:
            converter.inference_input_type = tf.uint8
    content = converter.convert()
    with open(path, "wb") as file:
        file.write(content if graph.batch_size else open_batch(content))
    if whole:
        _check_bytes_as_they_are(path)


def _batches(graph: Graph, images: np.ndarray) -> Iterator[list[np.ndarray]]:
    images = images.copy()
    # The range of the input is that of bytes, whatever the images hold: so a quantised input is the byte itself.
    images[0].flat[0], images[0].flat[-1] = 0, 255
    inputs = graph.prepared(images).astype(np.float32)
    size = graph.batch_size or 1
    for start in range(0, len(inputs) - size + 1, size):
        yield [inputs[start : start + size]]


def _check_bytes_as_they_are(path: str) -> None:
    details = _interpreter(path).get_input_details()[0]
    scale, zero = details["quantization"]
    if details["dtype"] is not np.uint8 or abs(scale - 1) > 1e-5 or zero != 0:
        raise UserError(f"the converter made input bytes mean (byte - {zero}) * {scale}; use --nopreprocess for int8.")


def _interpreter(path: str) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_path=path, num_threads=os.cpu_count())


def load(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """The file at `path`, run by LiteRT's interpreter, as a function of one batch of images."""
    interpreter = _interpreter(path)
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(images: np.ndarray) -> np.ndarray:
        if given["shape_signature"][0] == -1:
            interpreter.resize_tensor_input(given["index"], images.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return call
