"""The interface between models and the training loop: a task is a model, an objective and a prediction."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
class Precomputes(Protocol):
    """A task that takes features of its batches from what the parameters that training begins with say of each row.

    They are computed once, before training, of all rows, and are in the batches of training and of `metrics`.

    Attributes:
      precomputed: the names of these features, a float32 [B] each; none where there is nothing to compute.
      precomputed_title: what they are, in words: "the reference's likelihoods".
    """

    precomputed_title: str

    @property
    def precomputed(self) -> tuple[str, ...]:
        """See above."""
        ...

    def precompute(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Return these features of a batch; nothing of one that `predict` takes without them."""
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
      task: the other task, which is exported.
    """

    task: Task

    @property
    def evaluated(self) -> Task:
        """The task that evaluates and predicts, with the merged parameters."""
        ...

    def divide(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tree like the other task's parameters as parts of one like this task's."""
        ...

    def join(self, params: Mapping[str, Any]) -> Params:
        """Return what `divide` makes as the tree that it was."""
        ...

    def merge(self, params: Params) -> Params:
        """Return the parameters of `evaluated`."""
        ...

    def plain(self, params: Params) -> Params:
        """Return the other task's parameters, as what trained changes them, for its model alone."""
        ...


@dataclasses.dataclass(frozen=True)
class Question:
    """A number that a model computes of one example, to be explained by what the example holds.

    Attributes:
      title: what is explained, in words: "the class 'positive'".
      batch: the features of the example, [1, ...] each.
      inputs: the features that the model is called with, in order; those that `batch` lacks are None. What is explained
        is attributed to "image", and to all whose name ends in "input_ids".
      score: a function (model, inputs, choice) -> float32 [B, P] that `apply` calls as a method: P numbers, the sum of
        which is explained. A function of a module, not a closure: programs are kept for each.
      choice: what `score` gets besides, such as the number of a class.
      parts: names of the P numbers, where each is to be explained on its own too.
      position: the token, or the query, whose representation `score` reads; None where it reads all.
      vocabulary: the path of the blocks whose residual stream the model's output layer reads as tokens,
        "decoder/layers"; None where there is no such layer.
      box: left, top, right and bottom as shares of the image, where the number is about a part of it.
    """

    title: str
    batch: Batch
    inputs: tuple[str, ...]
    score: Callable[..., jax.Array]
    choice: Any = 0
    parts: tuple[str, ...] = ()
    position: int | None = None
    vocabulary: str | None = None
    box: tuple[float, float, float, float] | None = None


@runtime_checkable
class Explains(Protocol):
    """A task that says what of its outputs there is to explain; of others it is the largest number of the model's."""

    def questions(
        self, params: Params, batch: Batch, output: Mapping[str, np.ndarray], target: str
    ) -> Sequence[Question]:
        """Return one question or several about an example.

        Args:
          params: of the model.
          batch: the features of the example, [1, ...] each.
          output: what `predict` says of it.
          target: what to explain instead of the prediction, as the user names it; "" for the prediction.

        Raises:
          UserError: there is no such target; the message begins with "--target: ".
        """
        ...
