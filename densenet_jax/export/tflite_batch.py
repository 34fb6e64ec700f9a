"""Opens the batch of a TFLite file that was converted for one image.

Converted with an open batch, a file computes every shape while it runs: no bias is fused into its convolution,
averages become reductions that have no int8, and grouped convolutions are refused. Converted for one image it has none
of that, and the only operations that hold the batch in their arguments are slices.
"""

import copy
from typing import Any

import numpy as np

from densenet_jax.errors import UserError

_HOLD_A_BATCH = ("RESHAPE", "BROADCAST_TO", "FILL", "TRANSPOSE_CONV")  # none of them in a network of ours today


def open_batch(content: bytes) -> bytes:
    """The same file for any number of images; the interpreter's `resize_tensor_input` says how many.

    Args:
        content: a flatbuffer of one graph, whose first dimension is a batch of 1 from the input to the output.

    Raises:
        UserError: an operation holds the batch in a way that is not known here.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    (graph,) = model.subgraphs
    for operation in graph.operators:
        kind = flatbuffer_utils.opcode_to_name(model, operation.opcodeIndex)
        if kind == "SLICE":
            operation.inputs[2] = _all_of_the_batch(model, graph, operation.inputs[2])
        elif kind == "STRIDED_SLICE":
            operation.builtinOptions.endMask |= 1
        elif kind in _HOLD_A_BATCH:
            raise UserError(f"the converter made {kind} of a fixed batch size; give --batch_size.")
    computed = {index for operation in graph.operators for index in operation.outputs} | set(graph.inputs)
    for index in computed:
        tensor = graph.tensors[index]
        if len(tensor.shape) > 1:  # not of weights that are converted while the file runs
            tensor.shapeSignature = np.array([-1, *tensor.shape[1:]], np.int32)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _all_of_the_batch(model: Any, graph: Any, sizes: int) -> int:
    """A copy of the tensor `sizes` that takes all of the first dimension; others may read the tensor itself."""
    tensor = copy.deepcopy(graph.tensors[sizes])
    buffer = copy.deepcopy(model.buffers[tensor.buffer])
    values = np.frombuffer(bytes(buffer.data), np.int32).copy()
    values[0] = -1
    buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1
