"""Synthetic features that are rarely there, for models of superposition.

Elhage et al. (2022), "Toy Models of Superposition", section "Demonstrating superposition".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.data.source import Source
from research.errors import UserError


def sparse_features(count: int = 10_000_000, features: int = 20, sparsity: float = 0.0, seed: int = 0) -> Source:
    """Return vectors whose features are 0 with probability `sparsity`, and else uniform in [0, 1).

    Features: `features` float32 [features].

    Args:
      count: vectors; each is a function of `seed` and its position.
      features: numbers of a vector, which are independent of each other.
      sparsity: S, the probability that a feature is 0.
      seed: of all draws.

    Raises:
      UserError: an argument is out of range.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity: {sparsity} must lie in [0, 1)")
    if count < 1 or features < 1:
        raise UserError(f"count and features: {count} and {features} must be at least 1")
    return Source(_Vectors(count, features, sparsity, seed))


@dataclasses.dataclass(frozen=True)
class _Vectors(Sequence[Mapping[str, Any]]):
    """The vectors, drawn when they are asked for."""

    size: int
    features: int
    sparsity: float
    seed: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        values, draws = np.random.default_rng((self.seed, index)).random((2, self.features), np.float32)
        return {"features": np.where(draws < self.sparsity, np.float32(0), values)}
