"""How much memory a run has needed so far."""

import resource
import sys

import jax


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
