"""Where compiled programs are kept between commands, so that the next one need not compile them again."""

import hashlib
import os
import pathlib
import platform
import sys

# What JAX reads at its import. A user who sets the first one decides, and an empty one keeps nothing.
FOLDER, LEAST_SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def settle() -> None:
    """Lets JAX keep programs that took half a second to compile. Call it before JAX is imported.

    Nothing happens if the folder cannot be made, or if this process has imported JAX for something else.
    """
    if FOLDER in os.environ or "jax" in sys.modules:
        return
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return
    if os.access(folder, os.W_OK):
        os.environ[FOLDER] = str(folder)
        os.environ.setdefault(LEAST_SECONDS, "0.5")


def default_folder() -> pathlib.Path:
    """A folder in the user's cache, which programs for another kind of processor do not share."""
    named = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    caches = named if named.is_absolute() else pathlib.Path.home() / ".cache"  # as the XDG specification says
    return caches / "armd-jax" / "programs" / _processor()


def _processor() -> str:
    """The architecture, and on Linux a digest of the instruction sets that the compiler may use."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:8]}"
