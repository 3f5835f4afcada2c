"""Published weights rounded to fewer bits: what a quantised model computes, without a kernel for it.

The rounded weights are float32 again, so that this measures what a format costs in quality, and saves no memory.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import scipy.stats

from research.errors import UserError, nearest
from research.optimizer import check_patterns, path_values
from research.pretrained import huggingface
from research.pretrained.huggingface import Report


def load_params(
    path: str,
    model: nn.Module,
    params_shape: Any,
    format: str = "nf4",
    targets: tuple[str, ...] = (r"layers/.*kernel$",),
    block_size: int = 64,
) -> tuple[Any, Report]:
    """Read weights as `huggingface.load_params` does, and round those that `targets` name.

    `config.init = dict(call="research.pretrained.rounded.load_params", path="hf://ORG/NAME", format="nf4")`.

    Args:
      path: see `huggingface.load_params`.
      model: the model that the weights are for.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.
      format: see `FORMATS`.
      targets: regular expressions of the paths of the kernels [..., inputs, outputs] to round.
      block_size: inputs that share a scale in the formats of 4 bits.

    Raises:
      UserError: as `huggingface.load_params`, or there is no such format, or a target matches no kernel.
    """
    if format not in FORMATS:
        raise UserError(f"config.init.format: there is no '{format}'{nearest(format, FORMATS)}")
    if block_size < 1:
        raise UserError(f"config.init.block_size: {block_size} is less than 1")
    check_patterns("config.init.targets", targets, params_shape, "kernel")
    loaded, report = huggingface.load_params(path, model, params_shape)

    def rounded(value: float | np.ndarray, leaf: Any) -> Any:
        if np.all(value) or not isinstance(leaf, np.ndarray):
            return leaf
        if leaf.ndim < 2:
            raise UserError("config.init.targets: they match parameters that are no kernels, of one dimension")
        return np.where(value == 0, FORMATS[format](leaf, block_size), leaf).astype(leaf.dtype)

    kept = path_values(params_shape, tuple((pattern, 0.0) for pattern in targets))
    return jax.tree.map(rounded, kept, loaded), report


def int8(kernel: np.ndarray, block_size: int = 0) -> np.ndarray:
    """Round [..., inputs, outputs] to 8-bit integers with a scale for each output (Dettmers 2022, section 2.1).

    Args:
      kernel: what to round.
      block_size: not used; all inputs of an output share its scale.
    """
    scale = np.abs(kernel).max(axis=-2, keepdims=True) / 127
    return np.round(kernel / np.where(scale == 0, 1, scale)) * scale


def in_blocks(levels: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
    """Return a function that rounds [..., inputs, outputs] to the nearest level, in blocks of inputs.

    Each block is divided by its greatest magnitude before (Dettmers 2023, section 2). The last may be smaller.

    Args:
      levels: ascending, in [-1, 1].
    """
    middles = (levels[1:] + levels[:-1]) / 2

    def round_blocks(kernel: np.ndarray, block_size: int) -> np.ndarray:
        inputs = kernel.shape[-2]
        padded = np.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, -inputs % block_size), (0, 0)])
        blocks = padded.reshape(*kernel.shape[:-2], -1, block_size, kernel.shape[-1])
        scale = np.abs(blocks).max(axis=-2, keepdims=True)
        near = levels[np.searchsorted(middles, blocks / np.where(scale == 0, 1, scale))]
        return (near * scale).reshape(padded.shape)[..., :inputs, :]

    return round_blocks


def _normal_float() -> np.ndarray:
    """Return the 16 levels of NF4: quantiles of a normal distribution, exact at 0 (Dettmers 2023, section 3).

    One half has 8 steps and the other 7, from the probability that lies between the outermost of each.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    positive, negative = (scipy.stats.norm.ppf(np.linspace(outermost, 0.5, count)[:-1]) for count in (9, 8))
    levels = np.sort(np.concatenate([positive, [0.0], -negative]))
    return levels / np.abs(levels).max()


_HALF_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6  # two bits of exponent, one of mantissa
# What a block's values are rounded to in the formats of 4 bits, as shares of its greatest magnitude, ascending.
LEVELS: dict[str, np.ndarray] = {
    "nf4": _normal_float(),
    "fp4": np.unique(np.concatenate([-_HALF_FP4, _HALF_FP4])),
    "int4": np.arange(-7, 8) / 7,
}
FORMATS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "int8": int8,
    **{name: in_blocks(levels) for name, levels in LEVELS.items()},
}
