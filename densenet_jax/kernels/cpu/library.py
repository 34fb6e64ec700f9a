"""Registers the compiled kernels with XLA, by name."""

from __future__ import annotations

import ctypes
import functools
import os

import jax

from densenet_jax.system.native_build import build_at_first_use

# Call: symbol in the library.
_CALLS = {
    "block": "DensenetBlock",
    "stem": "DensenetStem",
    "output": "DensenetConvolution",
    "kernel_gradient": "DensenetKernelGradient",
    "pool_gradient": "DensenetPoolGradient",
    "norm_relu_conv": "DensenetNormReluConv",
    "norm_relu_conv_sums": "DensenetNormReluConvSums",
    "norm_relu_conv_gradient": "DensenetNormReluConvGradient",
    "add_norm_relu_conv_gradient": "DensenetAddNormReluConvGradient",
    "norm_relu_conv_kernel_gradient": "DensenetNormReluConvKernelGradient",
    "joined_conv_sums": "DensenetJoinedConvSums",
    "joined_conv_gradient": "DensenetJoinedConvGradient",
    "joined_conv_kernel_gradient": "DensenetJoinedConvKernelGradient",
    "forked_conv_sums": "DensenetForkedConvSums",
    "forked_conv_gradient": "DensenetForkedConvGradient",
    "forked_conv_kernel_gradient": "DensenetForkedConvKernelGradient",
    "depthwise_norm": "DensenetDepthwiseNorm",
    "depthwise_norm_kept": "DensenetDepthwiseNormKept",
    "depthwise_norm_gradient": "DensenetDepthwiseNormGradient",
    "bottleneck": "DensenetBottleneck",
    "bottleneck_kept": "DensenetBottleneckKept",
    "bottleneck_gradient": "DensenetBottleneckGradient",
    "elementwise": "DensenetElementwise",
    "square_sums": "DensenetSquareSums",
    "tail": "DensenetTail",
    "number": "DensenetNumber",
}


@functools.cache
def vector_bytes() -> int:
    """Returns the size of the vectors that the library computes with; 0 without one."""
    library = _load()
    return library[0].DensenetVectorBytes() if library else 0


@functools.cache
def bfloat16_products() -> int:
    """Returns how the library multiplies bfloat16 values here: by AMX (2), AVX512-BF16 (1) or slowly (0)."""
    library = _load()
    return library[0].DensenetBfloat16Products() if library else 0


@functools.cache
def int8_products() -> int:
    """Returns how the library multiplies integers of 8 bits here: by AMX (2), AVX512-VNNI (1) or slowly (0)."""
    library = _load()
    return library[0].DensenetInt8Products() if library else 0


@functools.cache
def target_names() -> dict[str, str]:
    """Returns XLA's name for each key of _CALLS; empty if the library was not built or DENSENET_JAX_NATIVE is 0.

    A name contains the library's hash, so that a program compiled with one library is not run with another.
    """
    loaded = _load()
    if loaded is None:
        return {}
    library, name = loaded
    names = {call: f"densenet_{call}_{name}" for call in _CALLS}
    for call, symbol in _CALLS.items():
        jax.ffi.register_ffi_target(names[call], jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return names


def _load() -> tuple[ctypes.CDLL, str] | None:
    """Returns the library and the hash in its name, compiled first if there is none."""
    from densenet_jax.kernels.cpu.build import build, library_paths  # not at load: `python -m` runs that module

    if os.environ.get("DENSENET_JAX_NATIVE") == "0":
        return None
    build_at_first_use("the CPU kernels", library_paths(), build)
    for path in library_paths():
        try:
            return ctypes.CDLL(os.fspath(path)), path.stem.split("-")[-1]
        except OSError:
            continue
    return None
