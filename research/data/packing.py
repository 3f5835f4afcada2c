"""Sequence packing: assigns documents to rows by first-fit and writes them with numpy.

A document is the sequences of an example. It may have two sides, an encoder's and a decoder's, which go to the same
row. Tokens of one document have the same number in the attention masks of both sides: 1, 2, ... in order of arrival.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError, nearest

# Features that packing creates; the others come from the documents.
MADE = ("attention_mask", "positions", "decoder_attention_mask", "decoder_positions")
OPEN_ROWS = 1024  # earlier rows are nearly full and are not tried, so that time is linear in the documents


def pack(
    examples: Sequence[Mapping[str, Any]],
    sides: Sequence[Mapping[str, float]],
    room: Sequence[int],
    apart: bool = False,
) -> dict[str, np.ndarray]:
    """Pack documents into rows, in order of arrival.

    Args:
      examples: with the sequences [T, ...] that `sides` names, of equal length on each side.
      sides: {feature: padding value} of one side or two; features in MADE are created here.
      room: the row length of each side.
      apart: put each example in its own row.

    Returns:
      every feature [R + 1, room, ...], and `mask` float32 [R + 1], which is 0 in the last row, which is empty.

    Raises:
      UserError: an example lacks a feature, has sequences of two lengths, or does not fit and must not be split.
    """
    names = [[name for name in side if name not in MADE] for side in sides]
    lengths = np.stack([_measure(examples, group) for group in names])
    if apart:
        _check_fit(lengths, room)
        rows = np.arange(len(examples))
    else:
        lengths = cut(lengths, room)
        rows = first_fit(lengths, room)
    count = rows.max(initial=-1) + 1
    packed: dict[str, np.ndarray] = {}
    for side, length, size in zip(sides, lengths, room):
        packed |= _lay(examples, side, length, rows, (count + 1, size))
    return packed | {"mask": (np.arange(count + 1) < count).astype(np.float32)}


def cut(lengths: np.ndarray, room: Sequence[int]) -> np.ndarray:
    """Return the lengths [S, M] of the pieces of documents of `lengths` [S, N]; empty documents have none.

    Documents with one side are split into pieces of `room` tokens, the last possibly shorter.
    """
    lengths = lengths[:, lengths.any(axis=0)]
    if len(room) > 1:
        _check_fit(lengths, room)
        return lengths
    counts = -(-lengths[0] // room[0])
    pieces = np.full(counts.sum(), room[0])
    pieces[np.cumsum(counts) - 1] = lengths[0] - (counts - 1) * room[0]
    return pieces[None]


def first_fit(lengths: np.ndarray, room: Sequence[int]) -> np.ndarray:
    """Return the row [N] of each piece: the first of the last OPEN_ROWS rows with room on every side."""
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


def _measure(examples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """Return the lengths [N] of one side."""
    for name in names:
        if (lacking := next((e for e in examples if name not in e), None)) is not None:
            raise UserError(f"config.data.features: examples have no '{name}'{nearest(name, lacking)}")
    every = np.array([[len(e[name]) for e in examples] for name in names], np.int64)
    if (unequal := (every != every[0]).any(axis=0)).any():
        found = dict(zip(names, every[:, unequal.argmax()].tolist()))
        raise UserError(f"config.data.pack: the sequences of an example have different lengths: {found}")
    return every[0]


def _check_fit(lengths: np.ndarray, room: Sequence[int]) -> None:
    for side, size in zip(lengths, room):
        if side.max(initial=0) > size:
            raise UserError(
                f"config.data.pack: {side.max()} tokens do not fit into a row of {size} and cannot be split"
            )


def _lay(
    examples: Sequence[Mapping[str, Any]],
    side: Mapping[str, float],
    lengths: np.ndarray,
    rows: np.ndarray,
    shape: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Write one side's pieces of `lengths` [N] into `rows` [N], one after another."""
    starts, numbers = _places(lengths, rows)
    tokens = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # positions within the piece
    places = np.repeat(rows * shape[1] + starts, lengths) + tokens
    laid = {}
    for name, fill in side.items():
        if name.endswith("attention_mask"):
            values = np.repeat(numbers.astype(np.int32), lengths)
        elif name in MADE:
            values = tokens.astype(np.int32)
        else:  # pieces of one sequence follow each other, so concatenation is enough
            values = np.concatenate([e[name] for e in examples if len(e[name])] or [examples[0][name]])
        flat = np.full((shape[0] * shape[1], *values.shape[1:]), fill, values.dtype)
        flat[places] = values
        laid[name] = flat.reshape(*shape, *values.shape[1:])
    return laid


def _places(lengths: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of each piece in its row and its number there, from 1, in order of arrival."""
    order = np.argsort(rows, kind="stable")
    ends = np.cumsum(lengths[order])
    first = np.searchsorted(rows[order], rows[order])  # first piece of the same row
    starts, numbers = np.empty_like(ends), np.empty_like(ends)
    starts[order] = (ends - lengths[order]) - (ends - lengths[order])[first]
    numbers[order] = np.arange(len(order)) - first + 1
    return starts, numbers
