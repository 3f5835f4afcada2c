"""What the ops that draw nothing make of a source, once for all epochs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from research.data import columns
from research.errors import UserError

Example = dict[str, Any]
Call = Callable[[Example, np.random.Generator], Any]


class Rows(Protocol):
    """Random access to rows, and to the lengths of their sequences."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """Return the length [N] of the longest of the named sequences in each row."""
        ...

    def gather(self, name: str, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return `lengths` [P] values of the sequences of `rows` [P], from `begins` [P] on, one after another."""
        ...


def rows(source: Any, calls: Sequence[Call], keep: Sequence[str] | None, lengths: bool) -> Rows:
    """Return the rows that `calls` make of the examples of a source.

    Args:
      source: examples by position.
      calls: what draws nothing, applied in turn.
      keep: the names that are needed of a row; None keeps all.
      lengths: whether lengths are asked for. Where they are not, and an example makes one row, examples are read when
        a row is asked for, and not before.
    """
    if not lengths and _one_to_one(source, calls):
        return Unprepared(source, calls)
    made = (row for i in range(len(source)) for row in apply(calls, source[i]))
    return columns.of_rows([row if keep is None else {name: row[name] for name in keep if name in row} for row in made])


class Unprepared:
    """The rows of a source whose examples make one row each, made when they are asked for."""

    def __init__(self, source: Any, calls: Sequence[Call]):
        """Take a source and what is applied to its examples."""
        self._source, self._calls = source, calls

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        """Return one row."""
        made = apply(self._calls, self._source[index])
        if len(made) != 1:
            raise UserError(f"config.data.ops: one example became {len(made)}, but the first did not become a list")
        return made[0]

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """Not known."""
        raise NotImplementedError

    def gather(self, name: str, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """There are no sequences."""
        raise NotImplementedError


def apply(calls: Iterable[Call], example: Example, rng: np.random.Generator | None = None) -> list[Example]:
    """Return what `calls` make of one example, each applied to all outputs of the one before."""
    rng = rng or np.random.default_rng(0)
    examples = [example]
    for call in calls:
        made = (call(e, rng) for e in examples)
        examples = [e for m in made for e in ([m] if isinstance(m, dict) else m)]
    return examples


def _one_to_one(source: Any, calls: Sequence[Call]) -> bool:
    """Return whether no call makes a list of the first example."""
    example, rng = source[0] if len(source) else {}, np.random.default_rng(0)
    for call in calls if len(source) else ():
        example = call(example, rng)
        if not isinstance(example, dict):
            return False
    return True
