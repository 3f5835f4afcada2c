"""Out of memory, explained in one line."""

import re

ADVICE = (
    "a larger config.optimizer.microbatches, config.task.model.remat='full' or a smaller config.batch_size takes "
    "less; config.mesh.fsdp splits parameters over more devices"
)
_SIZE = r"([\d.]+ ?(?:bytes|[KMGT]i?B?))\b"
# What XLA says on GPUs and CPUs, and of TPUs at compile time.
_ASKED = re.compile(rf"(?:trying to allocate|to allocate|[Aa]llocating|Used) {_SIZE}")
_LIMIT = re.compile(rf" of {_SIZE} (?:hbm|vmem|smem)")


def explain(error: BaseException) -> str | None:
    """Return what was asked for, what there is, and what takes less, or None where an error is of another kind."""
    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        return None
    asked, limit = _ASKED.search(text), _LIMIT.search(text)
    there = limit[1] if limit else _device_limit()
    parts = [f"asked for {_readable(asked[1])}" if asked else "", f"there are {_readable(there)}" if there else ""]
    said = ", ".join(part for part in parts if part)
    where = "host" if isinstance(error, MemoryError) else "device"
    return f"out of {where} memory{f' ({said})' if said else ''}: {ADVICE}"


def _device_limit() -> str:
    """Return the memory of the first device where it says."""
    import jax  # here, as most commands that fail do so before it is loaded

    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return f"{limit} bytes" if limit else ""


def _readable(size: str) -> str:
    number = re.fullmatch(r"(\d+) bytes", size)
    return f"{int(number[1]) / 2**30:.2f} GiB" if number else size
