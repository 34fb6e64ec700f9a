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
_NO_THREAD_CACHES = "glibc.malloc.tcache_count=0"


def has_nvidia() -> bool:
    """Returns whether there is an NVIDIA GPU."""
    return any(map(glob.glob, _NVIDIA))


def has_accelerator() -> bool:
    """Returns whether there is an NVIDIA GPU or a TPU."""
    return has_nvidia() or any(map(glob.glob, _TPU))


def restart_without_thread_caches() -> None:
    """Starts this process's program once more, with a malloc whose threads keep no freed pieces for themselves.

    XLA takes a step's temporaries aligned, for which malloc takes 96 bytes more and frees what is cut off at both ends.
    Where a thread keeps these ends, the freed block can't grow together with them: it is too small for the next step's,
    which is taken elsewhere, and the process holds hundreds of megabytes two or three times. Does nothing where
    `keep_freed_memory` does nothing, or in a process that was started for something else; call before it.
    """
    if _is_malloc_ours() and "GLIBC_TUNABLES" not in os.environ and _is_command(sys.argv, sys.orig_argv[1:]):
        sys.stdout.flush()
        os.environ["GLIBC_TUNABLES"] = _NO_THREAD_CACHES
        with contextlib.suppress(OSError):  # then this process goes on, with more memory
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_command(arguments: list[str], command: list[str]) -> bool:
    """Returns whether a process's command line started a program with these arguments, of which the first names it."""
    program, *others = arguments
    runs_it = program in command or command[:2] == ["-m", "densenet_jax"]
    return runs_it and command[len(command) - len(others) :] == others


def _is_malloc_ours() -> bool:
    """Returns whether malloc is glibc's, on a machine without accelerators, and not set up by the user."""
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    is_set = is_set or os.environ.get("GLIBC_TUNABLES", _NO_THREAD_CACHES) != _NO_THREAD_CACHES
    try:
        libc = ctypes.CDLL(None)  # other libraries' mallopt means other things
        return not is_set and not has_accelerator() and hasattr(libc, "gnu_get_libc_version")
    except (OSError, TypeError):
        return False


def keep_freed_memory() -> bool:
    """Makes malloc keep freed blocks, for steps on a CPU; call before JAX starts its threads. Returns whether it does.

    XLA takes a step's temporaries, hundreds of megabytes, in one block and frees them after the step. glibc returns a
    block of that size to the kernel, which zeroes every page of it again in the next step: an eighth of densenet121's
    processor time. Does nothing on a machine with an accelerator, where the user has set malloc's variables, or with
    another C library.
    """
    if not _is_malloc_ours():
        return False
    # One arena: large blocks need the first one, the only one that can grow enough.
    options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    return all(ctypes.CDLL(None).mallopt(name, value) for name, value in options)


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
