"""Rows as columns: what many examples hold under one name, in one array, in memory or mapped from a file."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError, nearest

Example = dict[str, Any]


class _Missing:
    """The type of MISSING."""


MISSING = _Missing()  # stands for a value in the rows that have none


@dataclasses.dataclass(frozen=True)
class Column:
    """What rows hold under one name.

    Attributes:
      values: [N] where each row has a number, [M, ...] where each has a sequence: those of all rows, one after another.
      offsets: [N + 1] where the sequences begin and end; None of numbers.
      dtype: of what a row gives; `values` may be kept in a smaller one.
    """

    values: np.ndarray
    offsets: np.ndarray | None
    dtype: np.dtype

    def __getitem__(self, index: int) -> Any:
        """Return what row `index` holds."""
        if self.offsets is None:
            return self.values[index].astype(self.dtype)
        return self.values[self.offsets[index] : self.offsets[index + 1]].astype(self.dtype, copy=False)

    def gather(self, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return `lengths` [P] values of the sequences of `rows` [P], from `begins` [P] on, one after another."""
        assert self.offsets is not None
        starts = self.offsets[rows] + begins
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return self.values[places].astype(self.dtype, copy=False)


class Columns:
    """Rows by position, each an example."""

    def __init__(self, columns: Mapping[str, Column | Sequence[Any]], length: int):
        """Hold `length` rows; what is no Column holds the rows' values as they are."""
        self.columns, self._length = dict(columns), length

    def __len__(self) -> int:
        """The number of rows."""
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Return one row."""
        values = ((name, column[index]) for name, column in self.columns.items())
        return {name: value for name, value in values if value is not MISSING}

    def gather(self, name: str, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return values of a sequence as `Column.gather` does; raise UserError if the rows hold none of that name."""
        if name not in self.columns:
            raise UserError(f"config.data.features: examples have no '{name}'{nearest(name, self.columns)}")
        if not isinstance(column := self.columns[name], Column) or column.offsets is None:
            raise UserError(f"config.data.features: '{name}' is not a sequence of numbers in every example")
        return column.gather(rows, begins, lengths)

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """Return the length [N] of the longest of the named sequences in each row; 0 where there are none."""
        longest = np.zeros(len(self), np.int64)
        for name in names:
            if (column := self.columns.get(name)) is None:
                continue
            if isinstance(column, Column):
                found = None if column.offsets is None else np.diff(column.offsets)
            else:
                found = np.array([0 if value is MISSING else len(value) for value in column], np.int64)
            longest = longest if found is None else np.maximum(longest, found)
        return longest


class Joined:
    """The rows of several parts, one part after another."""

    def __init__(self, parts: Sequence[Any]):
        """Take what holds rows as Columns does."""
        self._parts, lengths = parts, [len(part) for part in parts]
        self._starts = np.cumsum([0, *lengths])[:-1]
        self._length = sum(lengths)

    def __len__(self) -> int:
        """The number of rows."""
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Return one row."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """See `Columns.lengths`."""
        return np.concatenate([part.lengths(names) for part in self._parts])

    def gather(self, name: str, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See `Column.gather`."""
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(parts, kind="stable")
        numbers, begin = np.unique(parts[order], return_index=True)
        found = []
        for number, own in zip(numbers.tolist(), np.split(order, begin[1:])):
            found.append(self._parts[number].gather(name, rows[own] - self._starts[number], begins[own], lengths[own]))
        values = np.concatenate(found or [self._parts[0].gather(name, rows, begins, lengths)])
        gathered, sizes = np.empty_like(values), lengths[order]
        places = (np.cumsum(lengths) - lengths)[order] - (np.cumsum(sizes) - sizes)  # less where they stand now
        gathered[np.arange(len(values)) + np.repeat(places, sizes)] = values
        return gathered


def of_rows(rows: Sequence[Example]) -> Columns:
    """Return rows as columns: numbers and sequences of them as arrays, all else as it is."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Columns({name: _column([row.get(name, MISSING) for row in rows]) for name in names}, len(rows))


def _column(values: list[Any]) -> Column | list[Any]:
    if any(isinstance(value, str | bytes | Mapping) or value is MISSING or value is None for value in values):
        return values
    try:
        arrays = [np.asarray(value) for value in values]
    except ValueError:  # of several lengths
        return values
    if any(array.dtype.kind not in "biuf" for array in arrays):
        return values
    if all(array.ndim == 0 for array in arrays):
        stacked = np.array(arrays)
        return Column(stacked, None, stacked.dtype)
    if any(array.ndim == 0 for array in arrays):
        return values
    full = [array for array in arrays if array.size] or arrays[:1]
    if len({(array.shape[1:], array.dtype) for array in full}) > 1:
        return values
    empty = np.zeros((0, *full[0].shape[1:]), full[0].dtype)  # an empty list has neither
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return Column(np.concatenate([array if array.size else empty for array in arrays]), offsets, full[0].dtype)
