"""Settings of the C library's memory allocator for training on a CPU."""

import ctypes
import importlib.util
import os
import sys

# glibc's parameters (mallopt(3)): the name of each as a tunable, its number, and its value.
PARAMETERS = {
    "arena_max": (-8, 1),
    "mmap_max": (-4, 0),
    "mxfast": (1, 0),
    "trim_threshold": (-1, -1),  # that is, never
    "top_pad": (-2, 2**26),
}
# The value of GLIBC_TUNABLES for programs that cannot call `keep`.
TUNABLES = ":".join(f"glibc.malloc.{name}={value % 2**64}" for name, (_, value) in PARAMETERS.items())


def keep() -> None:
    """Make the C library reuse the buffers of a step for the next, unless JAX and its threads have started.

    Returning them to the kernel and mapping them again would take a fifth of a step or more. Many
    threads allocate, but only the main heap can keep memory, so all share it. With an accelerator this would only slow
    the threads that read data, so nothing is changed.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    early = "jax" not in sys.modules
    accelerated = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if sys.platform == "linux" and early and (platforms == "cpu" or not (platforms or accelerated)):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # missing in some C libraries
        for number, value in PARAMETERS.values():
            mallopt(number, value)
