"""Random tokens that are repeated: nothing but what stood before says what follows (Olsson 2022).

Olsson et al. (2022), "In-context learning and induction heads", section "Defining induction heads".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.data.source import Source
from research.errors import UserError


def repeated_tokens(
    count: int = 100_000, vocab_size: int = 64, length: int = 64, shortest: int = 8, seed: int = 0
) -> Source:
    """Return sequences of random tokens that begin again after a random number of them, for a causal language model.

    Features: `input_ids` and `targets` int32 [length], the token after each; `target_mask` float32 [length], 1 where
    the repetition says what the target is: only these can be predicted.

    Args:
      count: sequences; each is a function of `seed` and its position.
      vocab_size: the tokens are 0 to vocab_size - 1, each equally likely.
      length: tokens of a sequence, without the last target.
      shortest: the least number of tokens after which a sequence repeats; the greatest is length - shortest.
      seed: of all draws.

    Raises:
      UserError: an argument is out of range.
    """
    if not 1 <= shortest <= length // 2:
        raise UserError(f"shortest: {shortest} must lie between 1 and half of the length, {length // 2}")
    if vocab_size < 2 or count < 1:
        raise UserError(f"vocab_size and count: {vocab_size} and {count} must be at least 2 and 1")
    return Source(_Repeated(count, vocab_size, length, shortest, seed))


@dataclasses.dataclass(frozen=True)
class _Repeated(Sequence[Mapping[str, Any]]):
    """The sequences, drawn when they are asked for."""

    size: int
    vocab_size: int
    length: int
    shortest: int
    seed: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        rng = np.random.default_rng((self.seed, index))
        period = int(rng.integers(self.shortest, self.length - self.shortest + 1))
        tokens = np.resize(rng.integers(self.vocab_size, size=period), self.length + 1).astype(np.int32)
        known = np.arange(1, self.length + 1) > period
        return {"input_ids": tokens[:-1], "targets": tokens[1:], "target_mask": known.astype(np.float32)}
