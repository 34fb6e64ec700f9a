"""This machine: its accelerators, its memory, and malloc's handling of freed blocks; never starts JAX."""

import contextlib
import ctypes
import glob
import os
import resource
import sys

_NVIDIA = ("/dev/nvidia[0-9]*", "/dev/dxg")  # the latter under WSL
_TPU = ("/dev/accel*", "/dev/vfio/[0-9]*")
# Parameters of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def has_nvidia() -> bool:
    """Returns whether there is an NVIDIA GPU."""
    return any(map(glob.glob, _NVIDIA))


def has_accelerator() -> bool:
    """Returns whether there is an NVIDIA GPU or a TPU."""
    return has_nvidia() or any(map(glob.glob, _TPU))


def keep_freed_memory() -> bool:
    """Makes malloc keep freed blocks, for steps on a CPU; call before JAX starts its threads. Returns whether it does.

    XLA takes a step's temporaries, hundreds of megabytes, in one block and frees them after the step. glibc returns a
    block of that size to the kernel, which zeroes every page of it again in the next step: an eighth of densenet121's
    processor time. Does nothing on a machine with an accelerator, where the user has set malloc's variables, or with
    another C library.
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_set or has_accelerator():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 - other libraries' mallopt means other things
    except (AttributeError, OSError):
        return False
    # One arena: large blocks need the first one, the only one that can grow enough.
    return all(mallopt(name, value) for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)))


def release_freed_memory() -> None:
    """Gives freed blocks back to the system: once, after compiling, which leaves hundreds of megabytes of them."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def memory_used() -> dict[str, int]:
    """Returns peaks since the process began, in bytes.

    "memory_bytes" is the fullest of this process's devices, left out where the backend does not report it (the CPU does
    not); "host_memory_bytes" is the process's resident memory.
    """
    import jax  # not at the top: malloc is set up before it

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**({"memory_bytes": max(peaks)} if peaks else {}), "host_memory_bytes": host}
