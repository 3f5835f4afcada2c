"""Sequence packing: assigns documents to rows by first-fit, from their lengths, and lays them there with numpy.

A document is the sequences of an example. It may have two sides, an encoder's and a decoder's, which go to the same
row. Tokens of one document have the same number in the attention masks of both sides: 1, 2, ... in order of arrival.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError, nearest

# Features that packing creates; the others come from the documents.
MADE = ("attention_mask", "positions", "decoder_attention_mask", "decoder_positions")
OPEN_ROWS = 1024  # earlier rows are nearly full and are not tried, so that time is linear in the documents


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Where the pieces of documents stand in packed rows; all arrays [P], but for `lengths` and `starts` [S, P].

    Attributes:
      documents: the document that each is a piece of.
      begins: where in the document it begins.
      lengths: its tokens on each side.
      rows: the row that it is laid in.
      starts: where in the row it starts, on each side.
      numbers: its number in the row, from 1.
    """

    documents: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self.rows.max(initial=-1)) + 1

    def within(self, rows: np.ndarray) -> "Pieces":
        """Return the pieces of `rows` alone, which become the rows 0, 1, ..."""
        place = np.full(max(self.count, rows.max(initial=-1) + 1), -1)
        place[rows] = np.arange(len(rows))
        kept = np.flatnonzero(place[self.rows] >= 0)
        return Pieces(
            self.documents[kept],
            self.begins[kept],
            self.lengths[:, kept],
            place[self.rows[kept]],
            self.starts[:, kept],
            self.numbers[kept],
        )


def pack(
    examples: Sequence[Mapping[str, Any]],
    sides: Sequence[Mapping[str, float]],
    room: Sequence[int],
    apart: bool = False,
) -> dict[str, np.ndarray]:
    """Pack examples into rows, in order of arrival.

    Args:
      examples: with the sequences [T, ...] that `sides` names, of equal length on each side.
      sides: as in `lay`.
      room: the row length of each side.
      apart: put each example in its own row.

    Returns:
      what `lay` does, of all rows and of an empty one, which is last.

    Raises:
      UserError: an example lacks a feature, has sequences of two lengths, or does not fit and must not be split.
    """
    pieces = assign(np.stack([measure(examples, side) for side in sides]), room, apart)
    count = len(examples) if apart else pieces.count
    packed = lay(pieces, sides, room, count + 1, of_examples(examples, pieces))
    packed["mask"] = (np.arange(count + 1) < count).astype(np.float32)
    return packed


def assign(lengths: np.ndarray, room: Sequence[int], apart: bool = False) -> Pieces:
    """Assign documents of `lengths` [S, N] to rows of `room` tokens on each side, in order of arrival.

    Documents of one side that are longer than a row are cut first; empty ones have no piece. `apart` gives each
    document a row of its own, empty ones included.

    Raises:
      UserError: a document does not fit and must not be cut.
    """
    if apart:
        check_fit(lengths, room)
        documents, begins, sizes = np.arange(lengths.shape[1]), np.zeros(lengths.shape[1], np.int64), lengths
        rows = documents
    else:
        documents, begins, sizes = cut(lengths, room)
        rows = first_fit(sizes, room)
    places = [_places(side, rows) for side in sizes]
    starts = np.stack([start for start, _ in places])
    return Pieces(documents, begins, sizes, rows, starts, places[0][1])


def cut(lengths: np.ndarray, room: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return documents [P], begins [P] and lengths [S, P] of the pieces of documents of `lengths` [S, N].

    Documents with one side are cut into pieces of `room` tokens, the last possibly shorter.
    """
    documents = np.flatnonzero(lengths.any(axis=0))
    lengths = lengths[:, documents]
    if len(room) > 1:
        check_fit(lengths, room)
        return documents, np.zeros(len(documents), np.int64), lengths
    counts = -(-lengths[0] // room[0])
    begins = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * room[0]
    return np.repeat(documents, counts), begins, np.minimum(np.repeat(lengths[0], counts) - begins, room[0])[None]


def first_fit(lengths: np.ndarray, room: Sequence[int]) -> np.ndarray:
    """Return the row [P] of each piece: the first of the last OPEN_ROWS rows with room on every side."""
    count = lengths.shape[1]
    free = np.repeat(np.asarray(room, np.int32)[:, None], count + 1, axis=1)
    rows = np.zeros(count, np.int64)
    used = 0
    for i, need in enumerate(lengths.T.tolist()):
        start = max(used - OPEN_ROWS, 0)
        fits = free[0, start : used + 1] >= need[0]  # the last candidate is a new row
        for side in range(1, len(need)):
            fits &= free[side, start : used + 1] >= need[side]
        row = start + int(fits.argmax())
        for side, tokens in enumerate(need):
            free[side, row] -= tokens
        used = max(used, row + 1)
        rows[i] = row
    return rows


def check_fit(lengths: np.ndarray, room: Sequence[int]) -> None:
    """Raise UserError if a document of `lengths` [S, N] is longer than a row on some side."""
    for side, size in zip(lengths, room):
        if side.max(initial=0) > size:
            raise UserError(
                f"config.data.pack: {side.max()} tokens do not fit into a row of {size} and cannot be split"
            )


def measure(examples: Sequence[Mapping[str, Any]], side: Iterable[str]) -> np.ndarray:
    """Return the lengths [N] of one side, on which all sequences of an example must have one length."""
    names = [name for name in side if name not in MADE]
    for name in names:
        if (lacking := next((e for e in examples if name not in e), None)) is not None:
            raise UserError(f"config.data.features: examples have no '{name}'{nearest(name, lacking)}")
    every = np.array([[len(e[name]) for e in examples] for name in names], np.int64)
    if (unequal := (every != every[0]).any(axis=0)).any():
        found = dict(zip(names, every[:, unequal.argmax()].tolist()))
        raise UserError(f"config.data.pack: the sequences of an example have different lengths: {found}")
    return every[0]


def of_examples(examples: Sequence[Mapping[str, Any]], pieces: Pieces) -> Callable[[str, np.ndarray], np.ndarray]:
    """Return what gives `lay` the features of examples, whose documents are numbered as they come."""

    def values(name: str, lengths: np.ndarray) -> np.ndarray:
        cuts = zip(pieces.documents.tolist(), pieces.begins.tolist(), lengths.tolist())
        parts = [examples[i][name][begin : begin + length] for i, begin, length in cuts if length]
        return np.concatenate(parts or [np.asarray(examples[0][name])[:0]])

    return values


def lay(
    pieces: Pieces,
    sides: Sequence[Mapping[str, float]],
    room: Sequence[int],
    count: int,
    values: Callable[[str, np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Lay pieces into `count` rows.

    Args:
      pieces: of these rows.
      sides: {feature: padding value} of one side or two; features in MADE are created here.
      room: the row length of each side.
      count: rows without a piece are empty.
      values: gives a feature of all pieces, [sum of their lengths, ...], of its name and the lengths [P].

    Returns:
      every feature [count, room, ...], and `mask` float32 [count], which is 0 in rows without a piece.
    """
    mask = np.zeros(count, np.float32)
    mask[pieces.rows] = 1
    packed: dict[str, np.ndarray] = {"mask": mask}
    for side, lengths, starts, size in zip(sides, pieces.lengths, pieces.starts, room):
        tokens = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # place within the piece
        places = np.repeat(pieces.rows * size + starts, lengths) + tokens
        for name, fill in side.items():
            if name.endswith("attention_mask"):
                found = np.repeat(pieces.numbers.astype(np.int32), lengths)
            else:
                found = tokens.astype(np.int32) if name in MADE else values(name, lengths)
            flat = np.full((count * size, *found.shape[1:]), fill, found.dtype)
            flat[places] = found
            packed[name] = flat.reshape(count, size, *found.shape[1:])
    return packed


def _places(lengths: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of each piece in its row and its number there, from 1, in order of arrival."""
    order = np.argsort(rows, kind="stable")
    ends = np.cumsum(lengths[order])
    first = np.searchsorted(rows[order], rows[order])  # first piece of the same row
    starts, numbers = np.empty_like(ends), np.empty_like(ends)
    starts[order] = (ends - lengths[order]) - (ends - lengths[order])[first]
    numbers[order] = np.arange(len(order)) - first + 1
    return starts, numbers
