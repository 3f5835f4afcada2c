"""The interface between models and the training loop: a task is a model, an objective and a prediction."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np

from research.metrics import Mean

# Always holds "mask", float32 [B]: 1 for a real example, 0 for padding.
Batch = Mapping[str, jax.Array]
Params = Mapping[str, Any]
Spec = Mapping[str, jax.ShapeDtypeStruct]


class Task(Protocol):
    """What the training loop needs of an objective. Implementations are frozen dataclasses around a Linen module."""

    @property
    def model(self) -> nn.Module:
        """The Linen module that the parameters belong to."""
        ...

    def init(self, rng: jax.Array, spec: Spec) -> Params:
        """Return new parameters for batches of the shapes in `spec`."""
        ...

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        """Return the training loss and further metrics to log.

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
        """Return one example's outputs in readable, JSON-serialisable form."""
        ...


@runtime_checkable
class DescribesRows(Protocol):
    """A task that describes its outputs with the rows that they were computed from, one or several per example."""

    def describe_rows(
        self, rows: Sequence[Mapping[str, Any]], outputs: Sequence[dict[str, np.ndarray]]
    ) -> dict[str, Any]:
        """Return one example's outputs in readable form.

        Args:
          rows: the output of `Dataset.transform` for the example.
          outputs: the output of `predict` for each row.
        """
        ...


@runtime_checkable
class Borrows(Protocol):
    """A task with fixed parameters of another run, such as a teacher's, which `config.init` must load.

    Attributes:
      borrowed: regular expressions that match their paths.
    """

    borrowed: tuple[str, ...]


@runtime_checkable
class Starts(Protocol):
    """A task some of whose parameters are made of those of the model, once `config.init` is read."""

    def start(self, params: Params) -> Params:
        """Return the parameters that training begins with, of those of `Task.init` and `config.init`; pure."""
        ...


@runtime_checkable
class KeepsStart(Starts, Protocol):
    """A task that compares its model with what it was when training began, as preferences do with their reference.

    `Task.init` and `config.init` make the parameters of the model; what `start` adds to them is fixed.

    Attributes:
      fixed: regular expressions that match the paths of what it adds; none where it adds nothing.
    """

    @property
    def fixed(self) -> tuple[str, ...]:
        """See above."""
        ...


@runtime_checkable
class NeedsWholeBatch(Protocol):
    """A task whose loss of an example depends on the others of its batch.

    The gradient of a batch in microbatches is not that of the whole then, which is why they are refused.

    Attributes:
      whole_batch: True.
    """

    whole_batch: bool


@runtime_checkable
class Adapts(Protocol):
    """A task that trains small parameters beside the frozen ones of another task, found under "base".

    Attributes:
      task: the other task, which evaluates, predicts and is exported, with the merged parameters.
    """

    task: Task

    def divide(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tree like the other task's parameters as parts of one like this task's."""
        ...

    def join(self, params: Mapping[str, Any]) -> Params:
        """Return what `divide` makes as the tree that it was."""
        ...

    def merge(self, params: Params) -> Params:
        """Return the other task's parameters, as what trained changes them."""
        ...
