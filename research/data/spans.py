"""Pieces of documents of which an op that draws makes two sides, and the spans that it takes out of them."""

from typing import Any

import numpy as np

from research.errors import UserError

Example = dict[str, Any]
PIECE = "piece"  # the tokens of a piece


def corrupted_lengths(max_length: int, noise_density: float = 0.15, mean_span_length: float = 3.0) -> tuple[int, int]:
    """Return how many tokens of text become an input of at most `max_length`, and the length of the target then.

    Raises:
      UserError: not even two tokens fit.
    """
    noise = noise_density, mean_span_length
    length = 1
    while corrupted_sides(length + 1, *noise)[0] <= max_length:
        length += 1
    if length < 2:
        raise UserError(f"max_length: {max_length} has no room for two tokens, a span's <extra_id> and eos")
    return length, corrupted_sides(length, *noise)[1]


def corrupted_sides(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Return how long the input and the target of `length` > 1 tokens are, with eos."""
    noise, spans = noise_counts(length, noise_density, mean_span_length)
    return length - noise + spans + 1, noise + spans + 1


def noise_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Return how many of `length` > 1 tokens are taken out, and in how many"""
    noise = min(max(round(length * noise_density), 1), max(length - 1, 1))
    return noise, min(max(round(noise / mean_span_length), 1), noise, max(length - noise, 1))


def pieces(example: Example, ids: np.ndarray, length: int) -> list[Example]:
    """Return the pieces of a document, but for a last one of a single token."""
    cut = (ids[start : start + length] for start in range(0, len(ids), length))
    return [example | {PIECE: piece} for piece in cut if len(piece) > 1]


def without_piece(example: Example) -> Example:
    """Return an example without the piece that both sides were made of."""
    return {name: value for name, value in example.items() if name != PIECE}


def partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Return `parts` lengths, each at least 1, with the sum `total`; all ways are as likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
