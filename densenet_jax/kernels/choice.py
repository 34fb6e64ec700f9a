"""Which dense layers the GPU's kernels compute, and which XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from densenet_jax.errors import UserError
from densenet_jax.kernels.gpu.tiles import LARGEST_OPERAND, MOST_OUTPUTS

Choice = Literal["xla", "pallas"]
WANTED = ("auto", "xla", "pallas")
_DTYPES = ("bfloat16", "float16")
_MEASURED_CAPABILITY = "9.0"  # Hopper: H100 and H200 are what the kernels were measured on
_MOST_MEASURED_OUTPUTS = 128


def check_wanted(wanted: str, platform: str, dtype: Any) -> None:
    """Checks that kernels which are asked for exist.

    Raises:
      UserError: they don't, for that platform ("cpu", "gpu", "tpu") or that dtype of activations.
    """
    if wanted not in WANTED:
        raise UserError(f"kernels={wanted!r}: expected one of {', '.join(WANTED)}")
    if wanted != "pallas":
        return
    if platform != "gpu":
        raise UserError(
            f"config.model.kernels is 'pallas', but these kernels are for GPUs and this is a {platform.upper()}; set "
            "it to 'auto'."
        )
    if jnp.dtype(dtype).name not in _DTYPES:
        raise UserError(
            f"config.model.kernels is 'pallas', whose kernels are for bfloat16 and float16, but config.model.dtype is "
            f"{jnp.dtype(dtype).name}; set config.model.dtype=bfloat16, or config.model.kernels=auto."
        )


def choose(
    platform: str,
    dtype: Any,
    shape: tuple[int, int, int],
    wanted: str = "auto",
    devices: Sequence[Any] | None = None,
) -> Choice:
    """What computes a dense layer's 1x1 convolution with all around it, in training.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of activations.
      shape: rows (positions of a device's examples), columns of the buffer that it reads, outputs.
      wanted: "auto" is "pallas" where the kernels were measured to be faster: on Hopper GPUs, up to 128 outputs.
      devices: that the program is for; None is JAX's own, if it has just one: how would it be divided over several?

    Raises:
      UserError: "pallas" is wanted where there is none.
    """
    check_wanted(wanted, platform, dtype)
    rows, columns, outputs = shape
    if wanted == "auto" and platform == "gpu" and outputs <= _MOST_MEASURED_OUTPUTS:
        wanted = "pallas" if jnp.dtype(dtype).name in _DTYPES and _are_measured(devices) else "xla"
    fits = outputs <= MOST_OUTPUTS and 0 < rows * max(columns, outputs) <= LARGEST_OPERAND
    return "pallas" if wanted == "pallas" and fits else "xla"


def _are_measured(devices: Sequence[Any] | None) -> bool:
    if devices is None:
        devices = jax.devices()[: jax.device_count() == 1]
    capabilities = {getattr(device, "compute_capability", None) for device in devices}
    return capabilities == {_MEASURED_CAPABILITY}
