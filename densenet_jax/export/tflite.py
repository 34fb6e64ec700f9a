"""TFLite in float32, with float16 weights or in int8, using only TFLite's built-in operations.

For any batch size, a model is converted for one image, and `open_batch` then edits the file. Converting with an open
batch would compute every shape at run time: biases would not be fused, averages would become reductions without int8,
and grouped convolutions would be rejected.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from densenet_jax.errors import UserError
from densenet_jax.export.graph import Graph
from densenet_jax.export.savedmodel import make_tensorflow_function
from densenet_jax.export.verify import Outputs

# Operations with the batch size in their arguments; today's networks have none of them but RESHAPE of each example by
# itself, which is edited.
_FIXED_BATCH = ("RESHAPE", "BROADCAST_TO", "FILL", "TRANSPOSE_CONV")


def write(graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None:
    """Writes the TFLite file.

    Args:
        precision: "float32"; "float16" for half-size weights, computed in float32 on devices without float16; "int8"
            for weights and activations, with bytes as input if preprocessing is included.
        representative: images uint8 [n, h, w, c] that calibrate the activation ranges of int8.

    Raises:
        UserError: the model can't be expressed in TFLite.
    """
    import tensorflow as tf

    if graph.model.allowed_classes is not None:
        raise UserError("config.eval.class_map is not supported by --format tflite; leave it empty.")
    if graph.input_dtype == np.uint16 and precision == "int8":
        raise UserError("--precision int8 takes pixels of 8 bits, but this model has 16; choose float16 or float32.")
    whole = (
        precision == "int8" and not graph.preprocessed
    )  # input bytes are the quantized values: nothing runs in float
    dtype = np.float32 if whole else graph.input_dtype
    to_probabilities = tf.math.sigmoid if graph.model.many_labels else tf.nn.softmax
    after = to_probabilities if not graph.preprocessed else tf.identity
    function: Any = make_tensorflow_function(graph, graph.logits, dtype, graph.batch_size or 1, after)
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
        _check_input_is_bytes(path)


def _batches(graph: Graph, images: np.ndarray) -> Iterator[list[np.ndarray]]:
    images = images.copy()
    # Calibrate the input to the full range of bytes, so that a quantized input is the byte itself.
    images[0].flat[0], images[0].flat[-1] = 0, 255
    inputs = graph.prepare(images).astype(np.float32)
    size = graph.batch_size or 1
    for start in range(0, len(inputs) - size + 1, size):
        yield [inputs[start : start + size]]


def _check_input_is_bytes(path: str) -> None:
    details = _make_interpreter(path).get_input_details()[0]
    scale, zero = details["quantization"]
    if details["dtype"] is not np.uint8 or abs(scale - 1) > 1e-5 or zero != 0:
        raise UserError(f"the converter scaled input bytes to (byte - {zero}) * {scale}; use --nopreprocess for int8.")


def _make_interpreter(path: str) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_path=path, num_threads=os.cpu_count())


def load(path: str) -> Callable[[np.ndarray], Outputs]:
    """Loads the file into LiteRT's interpreter, as a function of one batch of images."""
    interpreter = _make_interpreter(path)
    (given,), results = interpreter.get_input_details(), interpreter.get_output_details()

    def call(images: np.ndarray) -> Outputs:
        if given["shape_signature"][0] == -1:
            interpreter.resize_tensor_input(given["index"], images.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        outputs = [interpreter.get_tensor(result["index"]) for result in results]
        return tuple(sorted(outputs, key=np.ndim))  # maps have more dimensions

    return call


def open_batch(content: bytes) -> bytes:
    """Lets a file converted for one image take any number, set by the interpreter's `resize_tensor_input`.

    `content` is a flatbuffer with one graph, whose first dimension is a batch of 1 from input to output.

    Raises:
        UserError: an operation depends on the batch size in a way that can't be edited.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    (graph,) = model.subgraphs
    for operation in graph.operators:
        kind = flatbuffer_utils.opcode_to_name(model, operation.opcodeIndex)
        if kind == "SLICE":
            operation.inputs[2] = _take_whole_batch(model, graph, operation.inputs[2])
        elif kind == "RESHAPE" and graph.tensors[operation.outputs[0]].shape[0] == 1:  # of each example by itself
            operation.inputs[1] = _take_whole_batch(model, graph, operation.inputs[1])
            if operation.builtinOptions is not None:
                operation.builtinOptions.newShape[0] = -1
        elif kind == "STRIDED_SLICE":
            operation.builtinOptions.endMask |= 1
        elif kind in _FIXED_BATCH:
            raise UserError(f"the converter wrote {kind} with a fixed batch size; set --batch_size.")
    computed = {index for operation in graph.operators for index in operation.outputs} | set(graph.inputs)
    for index in computed:
        tensor = graph.tensors[index]
        if len(tensor.shape) > 1:  # one-dimensional tensors are weights converted at run time
            tensor.shapeSignature = np.array([-1, *tensor.shape[1:]], np.int32)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _take_whole_batch(model: Any, graph: Any, sizes: int) -> int:
    """Copies the tensor of sizes, which may be shared, and lets its first be the whole batch."""
    tensor = copy.deepcopy(graph.tensors[sizes])
    buffer = copy.deepcopy(model.buffers[tensor.buffer])
    values = np.frombuffer(bytes(buffer.data), np.int32).copy()
    values[0] = -1
    buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1
