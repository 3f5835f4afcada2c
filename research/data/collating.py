"""Rows become a batch: numbers of one kind, sequences filled up to one length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError, nearest

Example = dict[str, Any]


def collate(
    examples: Sequence[Example],
    features: Sequence[str],
    lengths: Mapping[str, int],
    padding: Mapping[str, float],
    partial: bool = False,
) -> dict[str, np.ndarray]:
    """Return {feature: [N, ...]}, float32, int32 or bool.

    Args:
      examples: at least one.
      features: their names; `partial` leaves out those that an example lacks.
      lengths: {sequence: its length in the batch}.
      padding: {sequence: what fills it up}.

    Raises:
      UserError: a feature is missing, is no number, or is an array of several shapes.
    """
    names = [name for name in features if not partial or all(name in example for example in examples)]
    for name in names:
        if name not in examples[0]:
            raise UserError(f"config.data.features: examples have no '{name}'{nearest(name, examples[0])}")
    arrays = {name: [numbers(example[name], name) for example in examples] for name in names}
    return {
        name: _filled(found, lengths[name], padding[name]) if name in lengths else _stacked(found, name)
        for name, found in arrays.items()
    }


def numbers(value: Any, name: str) -> np.ndarray:
    """Return a feature as float32, int32 or bool."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise UserError(f"config.data.features: '{name}' is {type(value).__name__}, not numbers")
    kind = np.float32 if array.dtype.kind == "f" else np.int32 if array.dtype.kind in "iu" else bool
    return array.astype(kind, copy=False)


def _filled(arrays: Sequence[np.ndarray], length: int, fill: float) -> np.ndarray:
    model = next((array for array in arrays if len(array)), arrays[0])  # an empty list has neither shape nor dtype
    filled = np.full((len(arrays), length, *model.shape[1:]), fill, model.dtype)
    for row, array in zip(filled, arrays):
        if len(array):
            row[: len(array)] = array
    return filled


def _stacked(arrays: Sequence[np.ndarray], name: str) -> np.ndarray:
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)) for shape in shapes[:2])
        raise UserError(f"config.data.ops: a batch needs '{name}' of one shape, not of {found}; resize or crop images")
    return np.stack(arrays)
