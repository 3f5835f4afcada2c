"""Datasets whose batches carry numbers that are known of each row, beside what the ops make of the examples."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.data import batching
from research.data.dataset import Dataset
from research.data.mixture import Joined
from research.errors import UserError
from research.task import Spec

ROW = "row"


@dataclasses.dataclass(frozen=True)
class Beside(Dataset):
    """A dataset with a number for each of its rows.

    Attributes:
      values: {feature: [N]} of the rows that are prepared, in their order; see `count`.
    """

    values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def spec(self) -> Spec:
        """See `Dataset.spec`."""
        shapes = {k: jax.ShapeDtypeStruct((self.batch_size,), v.dtype) for k, v in self.values.items()}
        return {**super().spec, **shapes}

    def _read(self, own: batching.Batch, first: batching.Batch | None, size: int) -> dict[str, np.ndarray]:
        """Return `size` rows with their numbers, which are 0 for padding."""
        read = super()._read(own, first, size)
        for name, values in self.values.items():
            read[name] = np.zeros(size, values.dtype)
            read[name][: len(own.rows)] = values[own.rows]
        return read


def count(data: Dataset) -> int:
    """Return how many rows are prepared of a dataset."""
    return len(data._rows)


def beside(data: Dataset, values: Mapping[str, np.ndarray]) -> Beside:
    """Return a dataset with a number under each name for each of its rows, which are not prepared again.

    Raises:
      UserError: its rows are not the same in every epoch.
    """
    return _beside(data, data.source, values)


def numbered(data: Dataset) -> Beside:
    """Return a dataset with the numbers of its rows, int32 [B], as "row"; a mixture with weights without these.

    Raises:
      UserError: as `beside`.
    """
    source = Joined(data.source.sources) if isinstance(data.source, Joined) else data.source
    return _beside(data, source, {ROW: np.arange(count(data), dtype=np.int32)})


def _beside(data: Dataset, source: Any, values: Mapping[str, np.ndarray]) -> Beside:
    if data.pack:
        raise UserError("config.data.pack: packed rows hold pieces of several; nothing is known of them ahead")
    if data._stages[1]:
        raise UserError(
            "config.data.ops: one draws, which makes other rows in every epoch; nothing is known of them ahead"
        )
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(Dataset)}
    made = Beside(**fields | {"source": source, "values": values})
    vars(made)["_parts"] = data._parts  # the cached property
    return made
