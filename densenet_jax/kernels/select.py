"""Chooses Pallas or XLA for a dense layer, and whether its bottleneck is rematerialized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from densenet_jax.choices import KERNELS_WANTED
from densenet_jax.errors import UserError
from densenet_jax.kernels.gpu import tiles
from densenet_jax.kernels.tpu import conv1x1_gradients, conv3x3_gradients
from densenet_jax.kernels.tpu.tiles import LANES

Choice = Literal["xla", "pallas"]
# Platforms with Pallas kernels: the dtypes of activations that they take.
KERNEL_DTYPES = {"gpu": ("bfloat16", "float16"), "tpu": ("bfloat16",)}
_MEASURED_CAPABILITY = "9.0"  # Hopper: the kernels were measured on H100 and H200
_MOST_MEASURED_OUTPUTS = 128
_LARGE_TPUS = tuple("5678")  # generations with enough on-chip memory for the kernels
_ON_CHIP_BYTES = 128 << 20  # of a v5e or v6e


class BlockShape(NamedTuple):
    """Shape of a dense block.

    Attributes:
        examples, height, width, channels: of its input.
        bottleneck: channels after a layer's first convolution, 0 without a bottleneck.
        growth: channels that a layer adds.
    """

    examples: int
    height: int
    width: int
    channels: int
    layers: int
    bottleneck: int
    growth: int
    drops: bool = False

    @property
    def rows(self) -> int:
        """Positions of all examples."""
        return self.examples * self.height * self.width

    @property
    def columns(self) -> int:
        """Channels of all its feature maps."""
        return self.channels + self.layers * self.growth

    def is_on_chip(self, dtype: Any, channels: int) -> bool:
        """Whether a TPU's on-chip memory holds this many channels at all positions of all examples."""
        return self.rows * channels * jnp.dtype(dtype).itemsize <= _ON_CHIP_BYTES


def check_wanted(wanted: str, platform: str, dtype: Any) -> None:
    """Checks that the requested kernels exist.

    Raises:
        UserError: they don't exist for that platform or dtype.
    """
    if wanted not in KERNELS_WANTED:
        raise UserError(f"kernels={wanted!r}: expected one of {', '.join(KERNELS_WANTED)}")
    if wanted != "pallas":
        return
    if platform not in KERNEL_DTYPES:
        raise UserError(
            f"config.model.kernels is 'pallas', but these kernels are for GPUs and TPUs and this is a "
            f"{platform.upper()}; set it to 'auto'."
        )
    if jnp.dtype(dtype).name not in KERNEL_DTYPES[platform]:
        raise UserError(
            f"config.model.kernels is 'pallas', whose kernels are for {' and '.join(KERNEL_DTYPES[platform])} on a "
            f"{platform.upper()}, but config.model.dtype is {jnp.dtype(dtype).name}; set config.model.dtype=bfloat16, "
            "or config.model.kernels=auto."
        )


def choose(
    platform: str,
    dtype: Any,
    shape: tuple[int, int, int],
    wanted: str = "auto",
    devices: Sequence[Any] | None = None,
) -> Choice:
    """Chooses "pallas" or "xla" for a dense layer's 1x1 convolution with its norms on a GPU.

    Args:
        shape: rows (positions of a device's examples), columns of the buffer that it reads, outputs.
        wanted: "auto" is "pallas" where the kernels were measured to be faster: on Hopper GPUs, up to 128 outputs.
        devices: the program's; None is JAX's device if it has one only, else unknown.

    Raises:
        UserError: "pallas" is wanted and not supported.
    """
    check_wanted(wanted, platform, dtype)
    rows, columns, outputs = shape
    if wanted == "auto" and platform == "gpu" and outputs <= _MOST_MEASURED_OUTPUTS:
        wanted = "pallas" if jnp.dtype(dtype).name in KERNEL_DTYPES[platform] and _are_measured(devices) else "xla"
    return "pallas" if wanted == "pallas" and tiles.fits((rows, columns), outputs) else "xla"


def _known_devices(devices: Sequence[Any] | None) -> Sequence[Any]:
    return jax.devices()[: jax.device_count() == 1] if devices is None else devices


def _are_measured(devices: Sequence[Any] | None) -> bool:
    capabilities = {getattr(device, "compute_capability", None) for device in _known_devices(devices)}
    return capabilities == {_MEASURED_CAPABILITY}


def choose_layer_gradients(
    dtype: Any, block: BlockShape, wanted: str = "auto", devices: Sequence[Any] | None = None
) -> Choice:
    """Chooses "pallas" or "xla" for the backward pass of a dense layer on a TPU.

    Args:
        wanted: "pallas" takes the kernels, on TPUs from v5 on, for blocks whose feature maps and gradients do not stay
            on the chip; "auto" does not take them: they were compiled for TPUs, never run on one.

    Raises:
        UserError: "pallas" is wanted and not supported by the dtype or the chip, or for a number of examples that does
            not fill whole vectors.
    """
    check_wanted(wanted, "tpu", dtype)
    kinds = {str(getattr(device, "device_kind", "")) for device in _known_devices(devices)}
    if wanted != "pallas" or not kinds:
        return "xla"
    for kind in kinds:
        if kind.removeprefix("TPU").lstrip(" v")[:1] not in _LARGE_TPUS:
            raise UserError(
                f"config.model.kernels is 'pallas', but these kernels need the memory that TPUs have on the chip from "
                f"v5 on, and this is a {kind}; set it to 'auto'."
            )
    if block.examples % LANES:
        raise UserError(
            f"config.model.kernels is 'pallas', whose kernels take a multiple of {LANES} images on each TPU, but there "
            f"are {block.examples}: change config.train.global_batch_size or config.train.microbatches, or set it to "
            "'auto'."
        )
    if not block.bottleneck:
        return "xla"
    x = jax.ShapeDtypeStruct((block.examples, block.height, block.width, block.columns), dtype)
    stays_on_chip = block.is_on_chip(dtype, 2 * block.columns)
    start = block.columns - block.growth
    fits_conv3x3 = conv3x3_gradients.fits(x, (3, 3, block.bottleneck, block.growth), start)
    fits = fits_conv3x3 and conv1x1_gradients.fits(x, (start, block.bottleneck))
    return "pallas" if fits and not stays_on_chip else "xla"


def should_remat_bottleneck(dtype: Any, block: BlockShape) -> bool:
    """Whether a TPU recomputes bottlenecks in the backward pass rather than keeping them in memory.

    It does where they do not stay on the chip and a layer reads, on average, no more channels than keeping its
    bottleneck would write and read: in the first block of the ImageNet networks, which has half of all bottlenecks.
    """
    mean_read = (block.channels + block.columns) / 2
    return not block.is_on_chip(dtype, block.layers * block.bottleneck) and mean_read <= 2 * block.bottleneck
