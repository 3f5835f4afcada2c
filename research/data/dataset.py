"""From a source of examples to batches: read, shuffled, transformed, sorted by length, padded; by Grain.

The order of training examples is a function of (seed, position) and the same however often a run is interrupted.
Batches are cut from windows of consecutive shuffled examples that are sorted by length, and padded to the least of a
few lengths that holds them: little padding, few compiled shapes.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain.python as grain
import jax
import numpy as np

from research import sharding
from research.errors import UserError, nearest
from research.task import Spec

Example = dict[str, Any]


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples, and how they become batches.

    Attributes:
      source: random access to examples.
      features: what goes into a batch; a feature that an example lacks is an error in training and evaluation.
      ops: callables from example to example, applied in turn; one with a parameter `rng` gets a numpy Generator that
        is a function of (seed, position). One with `padding` makes sequences: feature -> what fills it up; its
        `max_length` is their greatest length.
      batch_size: global.
      seed: of the order and of the ops.
      length_buckets: how many lengths batches may have, chosen to pad least, or the lengths themselves.
      window: batches that are sorted by length together.
    """

    source: Source
    features: tuple[str, ...]
    ops: tuple[Callable[..., Example], ...] = ()
    batch_size: int = 32
    seed: int = 0
    length_buckets: int | tuple[int, ...] = 4
    window: int = 50

    @functools.cached_property
    def padding(self) -> dict[str, int]:
        """Feature -> what fills it up, for the features that are sequences."""
        every = {name: fill for op in self.ops for name, fill in getattr(op, "padding", {}).items()}
        return {name: fill for name, fill in every.items() if name in self.features}

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that batches may have, ascending; empty where nothing is a sequence."""
        if not self.padding:
            return ()
        longest = max(op.max_length for op in self.ops if hasattr(op, "max_length"))
        if isinstance(self.length_buckets, tuple):
            if longest > max(self.length_buckets):
                raise UserError(f"length_buckets: {self.length_buckets} has no room for max_length {longest}")
            return tuple(sorted(self.length_buckets))
        count = min(len(self.source), 4096)
        sample = grain.MapDataset.source(range(len(self.source))).seed(self.seed).shuffle()
        measured = [self._length(self.transform(self.source[sample[i]])) for i in range(count)]
        return best_lengths(measured, self.length_buckets, longest)

    @functools.cached_property
    def spec(self) -> Spec:
        """Feature -> global shape and dtype of the largest batch."""
        example = self.transform(self.source[0]) | {"mask": np.float32(1)}
        batch = self._collate([example], self.lengths[-1] if self.lengths else None)
        return {k: jax.ShapeDtypeStruct((self.batch_size, *v.shape[1:]), v.dtype) for k, v in batch.items()}

    def transform(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Applies the ops to one example."""
        for op, is_random in zip(self.ops, self._random):
            example = op(example, rng=rng or np.random.default_rng(0)) if is_random else op(example)
        return example

    @functools.cached_property
    def _random(self) -> tuple[bool, ...]:
        """Which ops take a generator; looked up once, not for every example."""
        return tuple("rng" in inspect.signature(op).parameters for op in self.ops)

    def batches(self) -> grain.DatasetIterator:
        """Returns this process's part of endless shuffled training batches, each epoch in an order of its own.

        The iterator's `get_state` and `set_state` resume it exactly.
        """
        if len(self.source) == 0:
            raise UserError("the training data hold no example")
        indices = grain.MapDataset.source(range(len(self.source))).seed(self.seed).shuffle().repeat()
        return self._iterate(indices[jax.process_index() :: jax.process_count()], train=True)

    def epoch(self) -> Iterator[dict[str, np.ndarray]]:
        """Returns this process's part of batches that hold every example once.

        All processes get equally many; what fills them up has mask 0.
        """
        rows = math.ceil(len(self.source) / self.batch_size) * self.batch_size
        indices = grain.MapDataset.source(range(rows))
        return self._iterate(indices[jax.process_index() :: jax.process_count()], train=False)

    def rows(self, examples: Sequence[Example]) -> Iterator[tuple[Sequence[Example], dict[str, np.ndarray]]]:
        """Yields the user's own rows with their batches, in order, one batch size at a time (one process only)."""
        for start in range(0, len(examples), self.batch_size):
            part = examples[start : start + self.batch_size]
            transformed = [self.transform(e) | {"mask": np.float32(1)} for e in part]
            yield part, self._collate(transformed, self._bucket(transformed), partial=True)

    def _iterate(self, indices: grain.MapDataset, train: bool) -> grain.DatasetIterator:
        """Reads, transforms and batches the examples at `indices`; those beyond the source are fillers."""
        size = self.batch_size // jax.process_count()
        examples = indices.seed(self.seed).random_map(self._read)
        windows = examples.batch((self.window if self.padding else 1) * size, batch_fn=list)
        batches = windows.map_with_index(functools.partial(self._cut, size=size, train=train))
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 if self.padding else 4)
        return iter(grain.experimental.FlatMapIterDataset(batches.to_iter_dataset(options), _Each()))

    def _read(self, index: int, rng: np.random.Generator) -> Example:
        real = index < len(self.source)
        example = self.transform(self.source[index if real else 0], rng)
        return example | {"mask": np.float32(real)}

    def _cut(self, index: int, window: list[Example], size: int, train: bool) -> list[dict[str, np.ndarray]]:
        """Sorts a window by length and cuts it into batches; in training their order is shuffled again."""
        if self.padding:
            window = sorted(window, key=self._length)
        parts = [window[i : i + size] for i in range(0, len(window), size)]
        if train:
            order = np.random.default_rng((self.seed, index)).permutation(len(parts))
            parts = [parts[i] for i in order]
        return [self._collate(part, self._bucket(part)) for part in parts]

    def _length(self, example: Example) -> int:
        return max(len(example[name]) for name in self.padding)

    def _bucket(self, examples: Sequence[Example]) -> int | None:
        if not self.padding:
            return None
        longest = max(map(self._length, examples))
        return next(length for length in self.lengths if length >= longest)

    def _collate(self, examples: Sequence[Example], length: int | None, partial: bool = False) -> dict[str, np.ndarray]:
        """Stacks examples; sequences are padded to `length`. `partial` leaves out what the first one lacks."""
        names = [n for n in (*self.features, "mask") if n in examples[0] or not partial]
        for name in names:
            if name not in examples[0]:
                raise UserError(f"config.data.features: examples have no '{name}'{nearest(name, examples[0])}")
        return {name: np.stack([self._feature(e[name], length, name) for e in examples]) for name in names}

    def _feature(self, value: Any, length: int | None, name: str) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise UserError(f"config.data.features: '{name}' is {type(value).__name__}, not numbers")
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int32 if array.dtype.kind in "iu" else bool)
        return sharding.pad(array[None], length, self.padding[name])[0] if name in self.padding and length else array


def best_lengths(measured: Sequence[int], count: int, longest: int) -> tuple[int, ...]:
    """Returns at most `count` lengths, the last `longest`, that pad a sample of lengths least (dynamic programming)."""
    frequency = np.bincount(measured, minlength=longest + 1)[: longest + 1]
    examples = np.concatenate([[0], np.cumsum(frequency)])  # examples[l]: shorter than l
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


class _Each(grain.experimental.FlatMapTransform):
    """A list of batches becomes its batches."""

    max_fan_out = 1_000_000

    def flat_map(self, element: Sequence[Any]) -> Sequence[Any]:
        return element
