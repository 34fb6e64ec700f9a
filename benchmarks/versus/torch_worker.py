"""Trains or evaluates a network of timm, channels last; a worker of `turns`. Needs torch and timm, not JAX."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch_networks import make_network
from worker import serve


class TorchCase:
    """A step and its last result."""

    def __init__(self, step: Any, device: str) -> None:
        self._step, self._device = step, device
        self._result: Any = None

    def step(self) -> None:
        """Issues one step."""
        self._result = self._step()

    def wait(self) -> None:
        """Waits for the device."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        if not torch.isfinite(self._result.detach().reshape(-1)[0]):
            raise FloatingPointError("the result is not finite")

    def sample(self) -> list[float]:
        """Returns nothing: the weights are drawn otherwise than this project's."""
        return []

    def forget_peak(self) -> None:
        """Resets the device allocator's peak."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Returns the device allocator's peak."""
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else None


def prepare(
    model: str, mode: str, batch_size: int, image_size_px: int, dtype: str, form: str, architecture: dict[str, Any]
) -> tuple[TorchCase, dict[str, Any]]:
    """Makes a step of SGD with momentum on one batch (mode "train"), or its logits ("infer")."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    channels, num_classes = architecture["channels"], architecture["num_classes"]
    network = make_network(model, architecture, channels, num_classes).to(device).to(memory_format=torch.channels_last)
    network.train(mode == "train")
    images = torch.randn(batch_size, channels, image_size_px, image_size_px, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (batch_size,), device=device)
    call = torch.compile(network) if form == "compile" else network

    def autocast() -> contextlib.AbstractContextManager[Any]:
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device, getattr(torch, dtype))

    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)

    def train() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = torch.nn.functional.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    @torch.inference_mode()
    def infer() -> torch.Tensor:
        with autocast():
            return call(images)

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    device_info = {"platform": {"cuda": "gpu"}.get(device, device), "device": name, "version": torch.__version__}
    return TorchCase(train if mode == "train" else infer, device), device_info


if __name__ == "__main__":
    serve(prepare, lambda error: isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error))
