"""Which rows make which batch: planned from the lengths of the rows alone, before anything is read.

Batches are cut from windows of consecutive positions of a stream of rows, in training an endless one that is permuted
anew every epoch. A window is sorted by length, and each of its batches is padded to the shortest sufficient bucket
length; or its rows are packed together. Every process plans the same.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.data import packing
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a batch is made of.

    Attributes:
      rows: [N], the rows that it is made of.
      positions: [N], where each stands in the stream; what ops draw for it is a function of that and the seed.
      extents: [S, N], their lengths on each side.
      lengths: what the sides are padded to; () without sequences.
      pieces: where the rows, numbered from 0, stand in packed rows; None of a batch that is not packed.
    """

    rows: np.ndarray
    positions: np.ndarray
    extents: np.ndarray
    lengths: tuple[int, ...]
    pieces: packing.Pieces | None = None

    def part(self, begin: int, end: int) -> "Batch":
        """Return what the rows `begin` to `end` of the batch are made of, numbered from 0."""
        if self.pieces is None:
            return self._of(slice(begin, end), None)
        pieces = self.pieces.within(np.arange(begin, end))
        documents, numbers = np.unique(pieces.documents, return_inverse=True)
        return self._of(documents, dataclasses.replace(pieces, documents=numbers))

    def _of(self, chosen: Any, pieces: packing.Pieces | None) -> "Batch":
        return Batch(self.rows[chosen], self.positions[chosen], self.extents[:, chosen], self.lengths, pieces)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of a stream of rows.

    Attributes:
      count: the number of rows of an epoch.
      extents: gives the lengths [S, N] of rows [N] on each side at positions [N].
      batch_size: rows of a batch, those of all processes.
      window: how many rows are sorted, or packed, together.
      lengths: the bucket lengths of each side, ascending; of packed rows the one that they have; () without sequences.
      packed: whether rows are packed.
      seed: for the order.
      train: whether the stream is endless and shuffled; else it is one epoch, in order.
      order: gives the rows [N] at positions [N] of the endless stream, where it is not that of `seed`.
    """

    count: int
    extents: Callable[[np.ndarray, np.ndarray], np.ndarray]
    batch_size: int
    window: int
    lengths: tuple[tuple[int, ...], ...]
    packed: bool
    seed: int
    train: bool
    order: Callable[[np.ndarray], np.ndarray] | None = None

    def batches(self, number: int) -> list[Batch] | None:
        """Return the batches of a window; None after the last one."""
        positions = np.arange(number * self.window, (number + 1) * self.window)
        if not self.train:
            positions = positions[positions < self.count]
        if not len(positions) or not self.count:
            return None
        rows = self._ordered(positions)
        extents = self.extents(rows, positions)
        make = self._packed if self.packed else self._sorted
        return make(number, rows, positions, extents)

    def _ordered(self, positions: np.ndarray) -> np.ndarray:
        """Return the row [N] at each position."""
        if not self.train:
            return positions
        if self.order is not None:
            return self.order(positions)
        epochs, places = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            rows[epochs == epoch] = _permutation(self.seed, epoch, self.count)[places[epochs == epoch]]
        return rows

    def _sorted(self, number: int, rows: np.ndarray, positions: np.ndarray, extents: np.ndarray) -> list[Batch]:
        """Sort a window by length and cut it into batches; in training the batches are shuffled."""
        if self.lengths:
            *first, last = extents
            keys = [np.searchsorted(lengths, side) for lengths, side in zip(self.lengths, first)]
            order = np.lexsort((last, *reversed(keys)))  # by the bucket of the first side, then the other's length
            rows, positions, extents = rows[order], positions[order], extents[:, order]
        parts = split(len(rows), self.batch_size)
        if self.train:
            parts = [parts[i] for i in np.random.default_rng((self.seed, number)).permutation(len(parts))]
        made = ((rows[part], positions[part], extents[:, part]) for part in parts)
        return [Batch(*found, self._bucket(found[-1])) for found in made]

    def _bucket(self, extents: np.ndarray) -> tuple[int, ...]:
        """Return the shortest bucket length of each side that fits all of `extents` [S, N]."""
        return tuple(bucket(int(side.max()), lengths) for side, lengths in zip(extents, self.lengths))

    def _packed(self, number: int, rows: np.ndarray, positions: np.ndarray, extents: np.ndarray) -> list[Batch]:
        """Pack a window into rows and cut those into batches; in training the packed rows are shuffled first."""
        room = tuple(lengths[0] for lengths in self.lengths)
        pieces = packing.assign(extents, room)
        order = np.arange(pieces.count)
        if self.train:
            order = np.random.default_rng((self.seed, number)).permutation(pieces.count)
        whole = Batch(rows, positions, extents, room, pieces.within(order))
        return [whole.part(part[0], part[-1] + 1) for part in split(pieces.count, self.batch_size)]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 1)).permutation(count)


def split(count: int, size: int) -> list[np.ndarray]:
    """Split 0..count - 1, in order, into the fewest parts of at most `size`, as evenly as possible."""
    return np.array_split(np.arange(count), math.ceil(count / size)) if count else []


def bucket(length: int, lengths: Sequence[int]) -> int:
    """Return the shortest of the ascending `lengths` that fits."""
    if length > lengths[-1]:
        raise UserError(f"config.data.ops: {length} tokens, though the op's max_length is {lengths[-1]}")
    return lengths[bisect.bisect_left(lengths, length)]


def best_lengths(measured: Sequence[int] | np.ndarray, count: int, longest: int) -> tuple[int, ...]:
    """Return at most `count` bucket lengths, the last `longest`, that minimise padding (dynamic programming)."""
    frequency = np.bincount(measured, minlength=longest + 1)[: longest + 1]
    examples = np.concatenate([[0], np.cumsum(frequency)])  # examples[l]: number shorter than l
    # cost[j]: tokens, padding included, of the examples of length <= j with the buckets so far, the last at j.
    cost = np.arange(longest + 1) * examples[1:].astype(np.float64)
    choices = []
    for _ in range(count - 1):
        added = np.arange(longest + 1)[None] * (examples[1:][None] - examples[1:][:, None])  # bucket (i, j]
        total = np.where(np.tri(longest + 1, dtype=bool).T, cost[:, None] + added, np.inf)
        choices.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    lengths = [longest]
    for choice in reversed(choices):
        lengths.append(int(choice[lengths[-1]]))
    return tuple(sorted({length for length in lengths if length > 0}))
