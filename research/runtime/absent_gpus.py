"""GPUs that are not here: what XLA's compiler for CUDA is told of them, so that it compiles without one.

The extra "gpu-compiler" brings it, 250 MB, and no CUDA library. Autotuning is left out, so that a program's memory is
told and its speed is not.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax

from research.errors import UserError

# As new as the newest check of `jax.nn` asks for.
CUDNN_VERSION = 91200


@dataclasses.dataclass(frozen=True)
class Model:
    """What the compiler asks of a GPU.

    Attributes:
      name: what JAX calls it.
      major: of the compute capability.
      processors: how many.
      units: of float32 arithmetic in each.
      clock: the highest, GHz.
      cache: of the second level, bytes.
      shared: memory of a processor that its threads share, bytes; a block of them can have 1 KiB less.
    """

    name: str
    major: int
    processors: int
    units: int
    clock: float
    cache: int
    shared: int


# NVIDIA's white papers on each architecture, and its CUDA programming guide, "Compute capabilities".
MODELS = {
    "a100": Model("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 40 * 2**20, 164 * 2**10),
    "h100": Model("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
    "h200": Model("NVIDIA H200", 9, 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
}
PER_HOST = 8


def devices(kind: str, count: int, memory: float, bandwidth: float) -> list[Any] | None:
    """Return devices to compile for; None where there is no compiler, or it is not known what to tell it.

    Args:
      kind: "h100".
      count: how many; beyond eight of them, eight a host.
      memory: of each, bytes.
      bandwidth: of its memory, bytes a second.

    Raises:
      UserError: the compiler refuses.
    """
    if kind not in MODELS or not _installed():
        return None
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the libraries are not here either
    from jax.experimental import topologies

    hosts, each = (count // PER_HOST, PER_HOST) if count % PER_HOST == 0 else (1, count)
    options = {"topology": f"1x{hosts}x{each}", "target_config": _described(MODELS[kind], memory, bandwidth)}
    try:
        return list(topologies.get_topology_desc("", "cuda", **options).devices)
    except Exception as error:  # the plugin raises what it likes
        raise UserError(f"--topology: {kind}: {str(error).strip().splitlines()[0][:300]}") from None


def _installed() -> bool:
    try:
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
    except ModuleNotFoundError:
        return False


def _described(model: Model, memory: float, bandwidth: float) -> str:
    """Return XLA's GpuTargetConfigProto, as text."""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
          shared_memory_per_block: {48 * 2**10} shared_memory_per_core: {model.shared}
          shared_memory_per_block_optin: {model.shared - 2**10}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {model.processors} fpus_per_core: {model.units} clock_rate_ghz: {model.clock}
          memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f} l2_cache_size: {model.cache}
          cuda_compute_capability {{ major: {model.major} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {CUDNN_VERSION // 10**4} minor: {CUDNN_VERSION // 100 % 100} }}
        device_description_str: "{model.name}"
    """


@contextlib.contextmanager
def assumed_cudnn(devices: list[Any]) -> Iterator[None]:
    """Let JAX trace cuDNN's attention for GPUs that are not here, where it would look for the library."""
    absent = jax.default_backend() != "gpu" and devices[0].platform == "gpu"
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        asked = cudnn.check_cudnn_version
    except (ImportError, AttributeError):  # it has moved: what asks for it says what is missing
        absent = False
    if not absent:
        yield
        return
    try:
        cudnn.check_cudnn_version = lambda: CUDNN_VERSION
        yield
    finally:
        cudnn.check_cudnn_version = asked
