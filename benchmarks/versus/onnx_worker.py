"""Runs a network of this project by onnxruntime from an ONNX file; a worker of `turns`, without JAX and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from worker import serve


class OnnxCase:
    """An onnxruntime session and its input."""

    def __init__(self, session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> None:
        self._session, self._feed = session, feed
        self._result: np.ndarray | None = None

    def step(self) -> None:
        """Runs one inference; it is done when this returns."""
        self._result = self._session.run(None, self._feed)[0]

    def wait(self) -> None:
        """Does nothing: nothing is under way."""
        if self._result is None or not np.isfinite(self._result).all():
            raise FloatingPointError("the result is not finite")

    def forget_peak(self) -> None:
        """Does nothing: there is no device."""

    def peak_bytes(self) -> int | None:
        """Returns None: the process's memory counts."""
        return None


def prepare(path: str, batch_size: int, image_size_px: int, channels: int) -> tuple[OnnxCase, dict[str, Any]]:
    """Makes the case that computes one batch's logits by the file at path."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    shape = (batch_size, image_size_px, image_size_px, channels)
    images = np.random.default_rng(0).standard_normal(shape)
    kind = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[wanted.type]
    images = (np.abs(images) * 50).clip(0, 255).astype(kind) if kind is np.uint8 else images.astype(kind)
    device_info = {"platform": "cpu", "device": "cpu", "version": onnxruntime.__version__}
    return OnnxCase(session, {wanted.name: images}), device_info


if __name__ == "__main__":
    serve(prepare, lambda error: False)
