"""This machine: its accelerators, its memory, and what malloc does with freed blocks. Told without starting JAX."""

import ctypes
import glob
import os
import resource
import sys

import jax

_NVIDIA = ("/dev/nvidia[0-9]*", "/dev/dxg")  # the latter under WSL
_TPU = ("/dev/accel*", "/dev/vfio/[0-9]*")
# Of glibc's malloc.h: the parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def has_nvidia() -> bool:
    """Whether there is a GPU of NVIDIA's."""
    return any(map(glob.glob, _NVIDIA))


def has_accelerator() -> bool:
    """Whether there is such a GPU or a TPU."""
    return has_nvidia() or any(map(glob.glob, _TPU))


def keep_freed_memory() -> bool:
    """Has this process keep the blocks that it frees, for steps on a CPU; to be called before JAX starts its threads.

    XLA takes a step's temporaries, hundreds of megabytes, in one block and frees them after the step. glibc gives a
    block of that size back to the kernel, which zeroes every page of it anew in the next step: an eighth of
    densenet121's processor time. Nothing is done where an accelerator is in the machine, where malloc's variables are
    set by the user, or where the C library is another.

    Returns:
        Whether blocks are kept.
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_set or has_accelerator():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 - other libraries' mallopt means other things
    except (AttributeError, OSError):
        return False
    # Blocks that no arena of a thread can hold come from the first arena, which is the only one that can grow so far.
    return all(mallopt(name, value) for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)))


def memory_used() -> dict[str, int]:
    """Peaks since the process began.

    Returns:
        "memory_bytes" of the fullest of this process's devices, left out where the backend does not tell (the CPU
        does not), and "host_memory_bytes", the process's resident memory.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**({"memory_bytes": max(peaks)} if peaks else {}), "host_memory_bytes": host}
