"""ONNX through jax2onnx, for onnxruntime, TensorRT, OpenVINO and C++."""

import os
from collections.abc import Callable

import jax
import numpy as np

from densenet_jax.export.graph import Graph
from densenet_jax.export.verify import Outputs

OPSET = 21  # from 2024, supported by current runtimes


def write(graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None:
    """Writes an ONNX file with input "images", the graph's output names and its info as metadata.

    Args:
        precision: "float32", or "int8" for weights and activations of convolutions and matrix products, with one
            scale a channel.
        representative: images uint8 [n, h, w, c] that calibrate the activation ranges of int8.
    """
    import onnx
    from jax2onnx import to_onnx

    with jax.default_device(jax.local_devices()[0]):
        model = to_onnx(
            graph.function,
            inputs=[jax.ShapeDtypeStruct((graph.batch_size or "b", *graph.image_shape), graph.input_dtype)],
            model_name=graph.info["model"],
            opset=OPSET,
            input_names=["images"],
            output_names=list(graph.output_names),
        )
    onnx.helper.set_model_props(model, graph.info)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    if precision == "int8":
        assert representative is not None
        _quantize(path, graph.prepare(representative))


def _quantize(path: str, images: np.ndarray) -> None:
    """Replaces the file at `path` with its int8 version."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        """Yields calibration images one by one."""

        def __init__(self) -> None:
            self._inputs = ({"images": image[None]} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._inputs, None)

    coarse = f"{path}.int8"
    try:
        quant_pre_process(path, coarse)
        quantization.quantize_static(
            coarse,
            path,
            Reader(),
            per_channel=True,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"QDQDisableWeightAdjustForInt32Bias": True},
        )
    finally:
        if os.path.exists(coarse):
            os.remove(coarse)


def load(path: str) -> Callable[[np.ndarray], Outputs]:
    """Loads the file into onnxruntime on the CPU, as a function of images."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(None, {"images": images}))
