"""Runs an ONNX file of this project by onnxruntime or OpenVINO; a worker of `turns`, without JAX and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from worker import serve

Run = Callable[[np.ndarray], np.ndarray]


class OnnxCase:
    """A loaded file and its input."""

    def __init__(self, run: Run, images: np.ndarray) -> None:
        self._run, self._images = run, images
        self._result = np.empty(0)

    def step(self) -> None:
        """Runs one inference; it is done when this returns."""
        self._result = self._run(self._images)

    def wait(self) -> None:
        """Does nothing: nothing is under way."""
        if not self._result.size or not np.isfinite(self._result).all():
            raise FloatingPointError("the result is not finite")

    def sample(self) -> list[float]:
        """Returns the first image's logits."""
        return self._result[0].tolist()

    def forget_peak(self) -> None:
        """Does nothing: there is no device."""

    def peak_bytes(self) -> int | None:
        """Returns None: the process's memory counts."""
        return None


def load_onnxruntime(path: str, shape: tuple[int, ...], dtype: str) -> tuple[Run, Any, str]:
    """Returns a function of images, their dtype and the library's version."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    kind = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[wanted.type]
    return lambda images: session.run(None, {wanted.name: images})[0], kind, onnxruntime.__version__


def load_openvino(path: str, shape: tuple[int, ...], dtype: str) -> tuple[Run, Any, str]:
    """Does the same by OpenVINO, compiled for this shape and told what to compute in."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(shape))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    kind = np.dtype(model.input(0).get_element_type().to_dtype()).type
    return lambda images: request.infer({0: images})[0], kind, openvino.__version__.partition("-")[0]


LOADERS = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}


def prepare(
    path: str, batch_size: int, image_size_px: int, channels: int, runtime: str, dtype: str
) -> tuple[OnnxCase, dict[str, Any]]:
    """Makes the case that computes one batch's logits by the file at path."""
    shape = (batch_size, image_size_px, image_size_px, channels)
    run, kind, version = LOADERS[runtime](path, shape, dtype)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    if kind is np.uint8:
        images = (np.abs(images) * 50).clip(0, 255).astype(kind)
    return OnnxCase(run, images), {"platform": "cpu", "device": "cpu", "version": version}


if __name__ == "__main__":
    serve(prepare, lambda error: False)
