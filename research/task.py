"""The joint between models and the loop: a task is a model, an objective and a way to predict."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np

from research.metrics import Mean

# Always holds "mask", float32 [B]: 1 for a real example, 0 for one that only fills the batch up.
Batch = Mapping[str, jax.Array]
Params = Mapping[str, Any]
Spec = Mapping[str, jax.ShapeDtypeStruct]


class Task(Protocol):
    """What the loop asks of an objective. Implementations are frozen dataclasses around a Linen module."""

    @property
    def model(self) -> nn.Module:
        """The Linen module that the parameters belong to."""
        ...

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new parameters for batches of the shapes in `spec`."""
        ...

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the training loss and what else to log.

        The loss is a sum and its count: the step divides once, by the count over all microbatches and devices.
        """
        ...

    def metrics(self, params: Params, batch: Batch) -> dict[str, Mean]:
        """Return the evaluation metrics of a batch."""
        ...

    def predict(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Return the outputs for a batch, each with a leading axis B."""
        ...

    def describe(self, output: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return one example's outputs as a person reads them, and as JSON knows them."""
        ...


@runtime_checkable
class DescribesRows(Protocol):
    """A task that puts its outputs in words by what they were made from, be it one row of an example or several."""

    def describe_rows(
        self, rows: Sequence[Mapping[str, Any]], outputs: Sequence[dict[str, np.ndarray]]
    ) -> dict[str, Any]:
        """Return one example's outputs as a person reads them.

        Args:
          rows: what `Dataset.transform` makes of the example.
          outputs: what `predict` says of each row.
        """
        ...


@runtime_checkable
class Borrows(Protocol):
    """A task with parameters of another run, a teacher's say: `config.init` must bring them, and they must not change.

    Attributes:
      borrowed: regular expressions of their paths.
    """

    borrowed: tuple[str, ...]
