"""What a process does with memory that it no longer needs."""

import ctypes
import os

from densenet_jax.chips_here import has_accelerator

# Of glibc's malloc.h: the parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


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
