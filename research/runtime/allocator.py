"""Memory on a CPU: what the C library does with the buffers of a step that are no longer needed."""

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
# What GLIBC_TUNABLES holds for a program that `keep` cannot be called in.
TUNABLES = ":".join(f"glibc.malloc.{name}={value % 2**64}" for name, (_, value) in PARAMETERS.items())


def keep() -> None:
    """Have the C library keep the buffers of a step for the next one, unless JAX, with its threads, is there already.

    To return them to the kernel and to take them again, page by page, would be a fifth of a step's time and more. They
    are taken by many threads, of which only the main one's heap can keep them, so all share it. Where an accelerator
    computes that would only slow the threads that read data, and nothing is changed.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    early = "jax" not in sys.modules
    accelerated = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if sys.platform == "linux" and early and (platforms == "cpu" or not (platforms or accelerated)):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # not every C library has it
        for number, value in PARAMETERS.values():
            mallopt(number, value)
