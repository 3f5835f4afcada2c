"""Operations of a step, counted from its jaxpr, and what chips can do.

An operation is a multiplication or an addition of a matrix product or convolution, the rest counts nothing. Of a
training step three times the forward pass is counted (Kaplan 2020, section 2.1; Chowdhery 2022, appendix B): what the
backward pass computes again is no work on the model. Attention counts whole where it is causal too.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from research.task import Task


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do, as published.

    Attributes:
      peak: operations a second in bfloat16, dense.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      links: to other chips, bytes a second, both directions together; None where it is not published.
      kinds: a pattern of what JAX calls the device.
      devices: how many devices JAX makes of a chip.
    """

    peak: float
    memory: float
    bandwidth: float
    links: float | None
    kinds: str
    devices: int = 1


# TPUs: Google Cloud's page on each version (cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e). GPUs: NVIDIA's data
# sheets of the SXM modules. Read in November 2026.
CHIPS = {
    "v3": Chip(123e12, 32 * 2**30, 900e9, None, r"TPU v3", devices=2),
    "v4": Chip(275e12, 32 * 2**30, 1200e9, None, r"TPU v4"),
    "v5e": Chip(197e12, 16e9, 819e9, 400e9, r"TPU v5 ?(lite|e)"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9, r"TPU v5p?$"),
    "v6e": Chip(918e12, 32e9, 1638e9, 800e9, r"TPU v6 ?(lite|e)"),
    "a100": Chip(312e12, 80e9, 2039e9, 600e9, r"A100.*80GB"),
    "h100": Chip(989e12, 80e9, 3350e9, 900e9, r"H100"),
    "h200": Chip(989e12, 141e9, 4800e9, 900e9, r"H200"),
}


def chip_of(device: jax.Device) -> Chip | None:
    """Return what a device is, or is a part of; None where that is not known."""
    return next((chip for chip in CHIPS.values() if re.search(chip.kinds, device.device_kind)), None)


def of_training(task: Task, params: Any, batch: Mapping[str, Any]) -> float:
    """Return the operations of a training step on a batch, of arrays or of their shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return 3 * count(lambda *args: task.loss(*args)[0].total, params, dict(batch), key)


def count(function: Callable[..., Any], *args: Any) -> float:
    """Return the operations of a function of arrays, or of their shapes; scans count as often as they run."""
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out = equation.params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
    inner = [_of_jaxpr(jaxpr) for value in equation.params.values() for jaxpr in _jaxprs(value)]
    if equation.primitive.name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)


def _jaxprs(value: Any) -> list[Any]:
    """Return the jaxprs that a parameter of an equation is or holds."""
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    if hasattr(value, "eqns"):
        return [value]
    return [jaxpr for item in value for jaxpr in _jaxprs(item)] if isinstance(value, tuple | list) else []
