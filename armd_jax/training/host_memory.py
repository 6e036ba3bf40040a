"""How glibc's allocator treats the large buffers of a training step on a CPU."""

import ctypes
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Lets freed blocks stay with the process for the next step to use; True where that could be set (glibc).

    By default every large buffer of a step is mapped, filled with zeros page by page, and given back to the kernel,
    at every step anew: about a third of the CPU time of the quickstart's training on two cores.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl and others
        return False
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**28}
    return all([mallopt(name, value) for name, value in settings.items()])
