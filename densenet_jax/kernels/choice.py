"""Which dense layers the GPU's kernels compute, and which XLA."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from densenet_jax.errors import UserError
from densenet_jax.kernels.gpu.reader_gradients import MOST_OUTPUTS
from densenet_jax.kernels.gpu.tiles import LARGEST_OPERAND

Choice = Literal["xla", "pallas"]
WANTED = ("auto", "xla", "pallas")
_DTYPES = ("bfloat16", "float16")


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


def choose(platform: str, dtype: Any, shape: tuple[int, int, int], wanted: str = "auto") -> Choice:
    """What computes a dense layer's 1x1 convolution with all around it, in training.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of activations.
      shape: rows (positions of all examples), columns of the buffer that it reads, outputs.
      wanted: "auto" is "xla" on every platform until the kernels have been timed on a GPU.

    Raises:
      UserError: "pallas" is wanted where there is none.
    """
    check_wanted(wanted, platform, dtype)
    rows, columns, outputs = shape
    fits = outputs <= MOST_OUTPUTS and 0 < rows * max(columns, outputs) <= LARGEST_OPERAND
    return "pallas" if wanted == "pallas" and fits else "xla"
