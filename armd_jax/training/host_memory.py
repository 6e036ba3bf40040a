"""How glibc's allocator treats the large buffers of a training step on a CPU."""

import ctypes
import importlib.util
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


_ACCELERATORS = ("libtpu", "jax_plugins")


def trains_on_cpu() -> bool:
    """Whether JAX will compute on the CPU, found out without starting it: it was told to, or has nothing else."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or (not platforms and not any(map(importlib.util.find_spec, _ACCELERATORS)))


def settle() -> None:
    """Prepares the allocator if JAX will compute on the CPU. Call it before JAX is imported."""
    if trains_on_cpu():
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Keeps freed memory in the process, for the next step to use. Returns whether the allocator could be told (glibc).

    By default every large buffer of a step is mapped, filled with zeros page by page, and returned to the kernel, and
    so again at the next step: about a third of the CPU time of the quickstart's training on two cores. Call it before
    there are threads, which means before JAX is imported, because every thread would get an arena of its own.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl and others
        return False
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**28}
    return all([mallopt(name, value) for name, value in settings.items()])
