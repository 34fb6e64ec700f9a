"""Chips that can be planned for, with their published peaks."""

import dataclasses
from typing import Literal

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip."""

    name: str  # as in a topology, "v5e" in "v5e:16x16"
    compiler: Literal["tpu", "cuda"]  # libtpu or XLA's CUDA plugin
    flops: float  # peak bfloat16 operations a second, without sparsity
    memory_bytes: int  # capacity of its HBM
    memory_bytes_per_sec: float  # peak bandwidth of its HBM
    link_bytes_per_sec: float  # peak bandwidth of all links together, in one direction
    chips_per_host: int  # chips in a host of a multi-host slice
    axes: int
    source: str  # URL of the figures


_CLOUD = "https://cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 32 * GIB, 1.228e12, 300e9, 4, 3, f"{_CLOUD}/v4"),
        Chip("v5e", "tpu", 197e12, 16 * GIB, 0.819e12, 200e9, 4, 2, f"{_CLOUD}/v5e"),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2.765e12, 600e9, 4, 3, f"{_CLOUD}/v5p"),
        Chip("v6e", "tpu", 918e12, 32 * GIB, 1.638e12, 400e9, 4, 2, f"{_CLOUD}/v6e"),
        Chip("h100", "cuda", 989.5e12, 80 * GB, 3.35e12, 450e9, 8, 3, f"{_NVIDIA}/h100"),
        Chip("h200", "cuda", 989.5e12, 141 * GB, 4.8e12, 450e9, 8, 3, f"{_NVIDIA}/h200"),
    )
}
