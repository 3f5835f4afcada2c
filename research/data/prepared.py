"""What the ops that draw nothing make of a source, once for all epochs and all runs.

A small source is prepared in memory. What is made of a large one is kept in the cache, under a key of the source, the
ops and their code, and the tokenizer.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from research import assets
from research.data import columns, keys, preparing, shards
from research.errors import UserError

Example = dict[str, Any]
Call = Callable[[Example, np.random.Generator], Any]
VERSION = 1  # of the files
SAMPLE = 64  # examples from which the size of a source is estimated
IN_MEMORY = 2**21  # bytes of a source that is prepared in memory: a second or two
SHARD = (2**22, 2**26)  # bytes of a source that a shard is made of, at least and at most
SHARDS = 64  # where their size is between these


class Rows(Protocol):
    """Random access to rows, and to the lengths of their sequences."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Return one row."""
        ...

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """Return the length [N] of the longest of the named sequences in each row; 0 where there are none."""
        ...

    def gather(self, name: str, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return `lengths` [P] values of the sequences of `rows` [P], from `begins` [P] on, one after another."""
        ...


def rows(
    source: Any,
    name: str,
    ops: Sequence[Callable[..., Any]],
    features: Sequence[str],
    drawn: bool,
    lengths: bool,
    whole: bool,
) -> Rows:
    """Return the rows that `ops` make of the examples of a source.

    Args:
      source: examples by position.
      name: of it, for messages.
      ops: draw nothing; applied in turn.
      features: the names that are needed in the end.
      drawn: whether other ops follow. These get what `ops` made, and numbers, but no text of the source that is none
        of the features: pieces of a document need not all hold the document.
      lengths: whether lengths are asked for. Where they are not, and an example makes one row, examples are read when
        a row is asked for, and not before.
      whole: compare the checksums of all files, and make anew what is damaged.
    """
    calls = [with_rng(op) for op in ops]
    if not lengths and _one_to_one(source, calls):
        return Unprepared(source, calls)
    make = functools.partial(_make, calls=calls, features=tuple(features), drawn=drawn)
    size = _size(source)
    key = _key(source, ops, features, drawn) if size > IN_MEMORY else None
    if key is None:
        return columns.of_rows([row for i in range(len(source)) for row in make(source[i])])
    job = _job(source, make, size, key)
    if whole and (dropped := preparing.drop_damaged(job)):
        logging.warning("%d damaged parts of the prepared data in %s are made anew", dropped, job.folder)
    preparing.prepare(job, preparing.cores(), name)
    return shards.Shards([job.path(shard) for shard in range(job.count)])


def _job(source: Any, make: Callable[[Example], list[Example]], size: float, key: str) -> preparing.Job:
    least, most = SHARD
    count = min(max(round(size / min(max(size / SHARDS, least), most)), 1), len(source))
    return preparing.Job(assets.cache_dir() / "prepared" / key, source, make, count, size)


def _key(source: Any, ops: Sequence[Callable[..., Any]], features: Sequence[str], drawn: bool) -> str | None:
    """Return the key of prepared data, or None where a source or an op does not say what it is."""
    try:
        return keys.key_of(VERSION, source, list(ops), sorted(features), drawn)
    except (keys.UnknownError, RecursionError) as error:
        logging.warning("prepared data are not kept: what %s holds cannot be seen", error)
        return None


def _size(source: Any) -> float:
    """Return the bytes of a source, estimated from a few examples."""
    count = len(source)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64)).tolist() if count else []
    return sum(_bytes(source[i]) for i in chosen) / max(len(chosen), 1) * count


def _bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return np.asarray(value).nbytes


def _make(example: Example, calls: Sequence[Call], features: Sequence[str], drawn: bool) -> list[Example]:
    """Return the rows of an example, each with what is needed of it."""
    made = apply(calls, example)
    if drawn:
        return [_passed_on(row, example, features) for row in made]
    return [{name: row[name] for name in features if name in row} for row in made]


def _passed_on(row: Example, example: Example, features: Sequence[str]) -> Example:
    def needed(name: str, value: Any) -> bool:
        return name in features or value is not example.get(name) or not isinstance(value, str | bytes | Mapping | list)

    return {name: value for name, value in row.items() if needed(name, value)}


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


def draws(op: Callable[..., Any]) -> bool:
    """Return whether an op takes a generator."""
    return "rng" in inspect.signature(op).parameters


def with_rng(op: Callable[..., Any]) -> Call:
    """Return a function that calls an op with a generator if it takes one."""
    if draws(op):
        return lambda example, rng: op(example, rng=rng)
    return lambda example, rng: op(example)


def _one_to_one(source: Any, calls: Sequence[Call]) -> bool:
    """Return whether no call makes a list of the first example."""
    example, rng = source[0] if len(source) else {}, np.random.default_rng(0)
    for call in calls if len(source) else ():
        example = call(example, rng)
        if not isinstance(example, dict):
            return False
    return True
