"""Metrics as sums and counts, independent of how a batch is split, padded or sharded."""

import functools
import operator
from collections.abc import Iterable, Mapping

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mean:
    """A mean kept as a sum and a count, which can be merged.

    Attributes:
      total: float32 scalar, the sum of the values.
      count: float32 scalar, the number of values.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Mean":
        """Sum `values` where `mask`, of the same shape, is not 0; masked values may be NaN."""
        return cls(total=weighted(values.astype(jnp.float32), mask).sum(), count=mask.astype(jnp.float32).sum())

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> jax.Array:
        """Return total / count; NaN where nothing was counted."""
        return self.total / self.count


def weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return `values` * `weights`, and 0 where the weight is 0, whatever the value: it may be NaN."""
    return jnp.where(weights != 0, values * weights, 0.0)


def merge(means: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Merge the means of several batches by name."""
    means = list(means)
    return {name: functools.reduce(operator.add, [m[name] for m in means]) for name in means[0]}
