"""What accelerators this machine has, by its device files: told without starting JAX."""

import glob

_NVIDIA = ("/dev/nvidia[0-9]*", "/dev/dxg")  # the latter under WSL
_TPU = ("/dev/accel*", "/dev/vfio/[0-9]*")


def has_nvidia() -> bool:
    """Whether there is a GPU of NVIDIA's."""
    return any(map(glob.glob, _NVIDIA))


def has_accelerator() -> bool:
    """Whether there is such a GPU or a TPU."""
    return has_nvidia() or any(map(glob.glob, _TPU))
