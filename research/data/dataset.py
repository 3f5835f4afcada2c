"""The input pipeline, on Grain: reads, shuffles and transforms examples, buckets or packs them by length, pads.

The order of training examples is a function of (seed, position), whether or not a run is interrupted.
Batches are cut from windows of consecutive shuffled examples. A window is sorted by length, and its batches are padded
to the shortest sufficient bucket length: little padding, few compiled shapes. Alternatively, its documents are packed
into rows of one length, which gives one shape.
"""

import bisect
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain.python as grain
import jax
import numpy as np

from research import sharding
from research.data import packing
from research.errors import UserError, nearest
from research.task import Spec

Example = dict[str, Any]
SAMPLE = 4096  # maximum number of examples sampled to estimate lengths


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples and the pipeline that batches them.

    Sequences have sides. Where `decoder_input_ids` are among the features, those whose names begin with "decoder_" or
    "target" belong to the decoder and have their own length; all others share one.

    Attributes:
      source: random access to examples.
      features: the features of a batch; a missing one is an error in training and evaluation.
      ops: callables from an example to an example, or to a list of any number of them, always one or always the other;
        applied in turn. One with a parameter `rng` gets a numpy Generator that is a function of (seed, position).
        One with `padding` makes sequences: {feature: fill value}. Its `max_length` is their maximum length; for
        those on the decoder's side its `decoder_max_length` comes first. The last op that makes a feature counts.
      batch_size: the global batch size.
      seed: for the order and the ops.
      length_buckets: the number of bucket lengths, chosen to minimise padding, or the lengths themselves.
      window: the number of batches sorted by length, or packed, together. They are read before the first is used, and
        their number of examples is estimated from a sample where it is not that of the rows. The rows of a window are
        distributed evenly; missing rows, fewer than one batch in total, are padding rows with mask 0.
      decoder_length_buckets: the same as `length_buckets` for the decoder's side. The compiled shapes are at most the
        product of both numbers, 12; where long texts have long translations 7 of them occur.
      pack: the length of packed rows; longer sequences are split first; 0 disables packing. The
        features may then hold `attention_mask` (1, 2, ... at the documents of a row, 0 where it is empty) and
        `positions` (from 0 in each document), and `decoder_attention_mask` and `decoder_positions`.
      pack_decoder: the decoder length of packed rows; documents with two sides are not split.
    """

    source: Source = dataclasses.field(repr=False)  # Grain names its steps by their repr, which would write out a list
    features: tuple[str, ...]
    ops: tuple[Callable[..., Any], ...] = ()
    batch_size: int = 32
    seed: int = 0
    length_buckets: int | tuple[int, ...] = 4
    window: int = 50
    decoder_length_buckets: int | tuple[int, ...] = 3
    pack: int = 0
    pack_decoder: int = 0

    def __post_init__(self):
        for name in ("pack", "pack_decoder"):
            if (value := getattr(self, name)) != 0 and value < 2:
                raise UserError(f"{name}: {value} is too short for a row; rows need at least 2 tokens (0: no packing)")
        if self.pack or self.pack_decoder:
            self._check_pack()

    def _check_pack(self) -> None:
        """Raise UserError if the settings of packing are inconsistent."""
        if not self.pack:
            raise UserError(f"pack_decoder: {self.pack_decoder} needs `pack`, the length of the encoder's side")
        if not self._sides or all(name in packing.MADE for name in self._sides[0]):
            raise UserError(f"pack: no feature is a sequence that could be packed; they are {', '.join(self.features)}")
        if alien := [name for name in self.features if name not in self.padding]:
            raise UserError(f"features: '{alien[0]}' is not a sequence; packed rows hold sequences only")
        if (len(self._sides) == 2) != bool(self.pack_decoder):
            wrong = "needs decoder_input_ids in `features`" if self.pack_decoder else "is missing, beside `pack`"
            raise UserError(f"pack_decoder: it {wrong}")
        for side, room in zip(self._sides, self._room) if self.pack_decoder else ():
            if (longest := self._longest(side)) is not None and longest > room:
                raise UserError(
                    f"pack: the ops make {longest} tokens, but packed rows hold {room}, and pairs are never split"
                )

    @functools.cached_property
    def padding(self) -> dict[str, float]:
        """The padding value of each feature that is a sequence."""
        every = {name: fill for op in self.ops for name, fill in getattr(op, "padding", {}).items()}
        every |= dict.fromkeys(packing.MADE if self.pack else (), 0)
        return {name: fill for name, fill in every.items() if name in self.features}

    @property
    def lengths(self) -> tuple[int, ...]:
        """The bucket lengths, ascending; empty if no feature is a sequence."""
        return self._lengths[0] if self.padding else ()

    @functools.cached_property
    def size(self) -> int:
        """The number of rows in an epoch; estimated from a sample where ops make lists or rows are packed."""
        return round(len(self.source) * self._rows_per_example)

    @functools.cached_property
    def spec(self) -> Spec:
        """Feature -> global shape and dtype of the largest batch."""
        rows = (row for i in range(min(len(self.source), SAMPLE)) for row in self.transform(self.source[i]))
        if (first := next((row for row in rows if not self.pack or any(self._extent(row))), None)) is None:
            raise UserError(f"config.data.ops: they drop all of the first {SAMPLE} examples")
        longest = {name: lengths[-1] for side, lengths in zip(self._sides, self._lengths) for name in side}
        batch = self._packed([first]) if self.pack else self._collate([first | {"mask": np.float32(1)}], longest)
        return {k: jax.ShapeDtypeStruct((self.batch_size, *v.shape[1:]), v.dtype) for k, v in batch.items()}

    def transform(self, example: Example, rng: np.random.Generator | None = None) -> list[Example]:
        """Return the examples that the ops make of one example, each op applied to all outputs of the one before."""
        rng = rng or np.random.default_rng(0)
        examples = [example]
        for call in self._calls:
            made = (call(e, rng) for e in examples)
            examples = [e for m in made for e in ([m] if isinstance(m, dict) else m)]
        return examples

    def batches(self) -> grain.DatasetIterator:
        """Return this process's share of an endless stream of training batches, reshuffled every epoch.

        The iterator's `get_state` and `set_state` resume it exactly.
        """
        if len(self.source) == 0:
            raise UserError("config.data: the training data contain no examples")
        # Effectively endless: the greatest length that Grain can still count in windows of one example.
        indices = grain.MapDataset.source(range(len(self.source))).seed(self.seed).shuffle()
        indices = indices.repeat(2**62 // len(self.source))
        part = self._examples(indices)[jax.process_index() :: jax.process_count()]
        return self._iterate(part, self.batch_size // jax.process_count(), train=True)

    def epoch(self) -> Iterator[dict[str, np.ndarray]]:
        """Return this process's share of the batches of one epoch, which hold every example exactly once.

        All processes get the same number of batches; padding rows have mask 0.
        """
        process, local = jax.process_index(), self.batch_size // jax.process_count()
        if self._one_to_one:
            rows = math.ceil(len(self.source) / self.batch_size) * self.batch_size
            part = self._examples(grain.MapDataset.source(range(rows)))[process :: jax.process_count()]
            return self._iterate(part, local, train=False)
        # The number of rows is known only once they are made: every process makes all and keeps its share.
        own = slice(process * local, (process + 1) * local)
        every = self._examples(grain.MapDataset.source(range(len(self.source))))
        return self._iterate(every, self.batch_size, train=False, own=own)

    def rows(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Yield batches of given examples, in order and not packed together (one process only).

        Each batch comes with the index in `examples` of each row; the last batch may be smaller.
        """
        made = ((i, row) for i, example in enumerate(examples) for row in self.transform(example))
        while part := list(itertools.islice(made, self.batch_size)):
            rows = [row | {"mask": np.float32(1)} for _, row in part]
            if self.pack:
                batch = {name: value[:-1] for name, value in self._packed(rows, apart=True).items()}
            else:
                batch = self._collate(rows, self._bucket(rows), partial=True)
            yield [i for i, _ in part], batch

    def _examples(self, indices: grain.MapDataset) -> grain.MapDataset:
        """Read and transform the examples at `indices`; indices beyond the source give padding rows.

        Random draws depend on the position in `indices`, so processes slice the result, not `indices`; otherwise all
        would draw the same numbers.
        """
        return indices.seed(self.seed).random_map(self._read)

    def _iterate(
        self, examples: grain.MapDataset, size: int, train: bool, own: slice = slice(None)
    ) -> grain.DatasetIterator:
        """Make batches of `size` rows, of which this process takes its `own`."""
        _ = self._lengths  # computed once, before threads start
        windows = examples.batch(self._window_examples(size), batch_fn=list)
        cut = functools.partial(self._cut_packed if self.pack else self._cut_sorted, size=size, train=train, own=own)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 if self.padding else 4)
        batches = windows.map_with_index(cut).to_iter_dataset(options)
        return iter(grain.experimental.FlatMapIterDataset(batches, _Each()))

    def _window_examples(self, size: int) -> int:
        if self._one_to_one:
            return (self.window if self.padding else 1) * size
        return max(round(self.window * size / self._rows_per_example), 1)

    def _read(self, index: int, rng: np.random.Generator) -> list[Example]:
        real = index < len(self.source)
        rows = self.transform(self.source[index if real else 0], rng)
        if self._one_to_one and len(rows) != 1:
            raise UserError(f"config.data.ops: one example became {len(rows)}, but the first did not become a list")
        return [row | {"mask": np.float32(1)} if real else self._filler(row) for row in rows]

    def _filler(self, row: Example) -> Example:
        """Return a row of the same length that holds only padding."""
        empty = {name: np.full_like(np.asarray(row[name]), fill) for name, fill in self.padding.items() if name in row}
        return row | empty | {"mask": np.float32(0)}

    def _cut_sorted(
        self, index: int, window: list[list[Example]], size: int, train: bool, own: slice
    ) -> list[dict[str, np.ndarray]]:
        """Sort a window by length and cut it into batches; in training the batches are shuffled."""
        rows = [row for made in window for row in made]
        if self.padding:
            rows.sort(key=self._rank)
        parts = [[rows[i] for i in part] for part in _parts(len(rows), size)]
        if train:
            parts = [parts[i] for i in np.random.default_rng((self.seed, index)).permutation(len(parts))]
        filled = [part + [self._filler(part[0])] * (size - len(part)) for part in parts]
        return [self._collate(rows[own], self._bucket(rows)) for rows in filled]

    def _cut_packed(
        self, index: int, window: list[list[Example]], size: int, train: bool, own: slice
    ) -> list[dict[str, np.ndarray]]:
        """Pack a window into rows and cut those into batches; in training the rows are shuffled first."""
        documents = [row for made in window for row in made]
        if not documents:
            return []
        packed = self._packed(documents)
        empty = len(packed["mask"]) - 1
        order = np.random.default_rng((self.seed, index)).permutation(empty) if train else np.arange(empty)
        filled = [np.pad(order[p], (0, size - len(p)), constant_values=empty)[own] for p in _parts(empty, size)]
        return [{name: rows[chosen] for name, rows in packed.items()} for chosen in filled]

    def _packed(self, examples: Sequence[Example], apart: bool = False) -> dict[str, np.ndarray]:
        sides = self._sides
        if apart:  # examples to predict may lack features
            given = [{n: f for n, f in side.items() if n in packing.MADE or n in examples[0]} for side in sides]
            sides = tuple(side for side in given if side.keys() - packing.MADE)
        packed = packing.pack(examples, sides, self._room, apart)
        return {name: _numbers(value, name) for name, value in packed.items()}

    def _extent(self, example: Example) -> tuple[int, ...]:
        """Return the length of each side."""
        return tuple(max((len(example[name]) for name in side if name in example), default=0) for side in self._sides)

    def _rank(self, example: Example) -> tuple[int, ...]:
        """Return the sort key of a row: its length; with two sides the bucket of the first, then the other's length."""
        *first, last = self._extent(example)
        return (*(bisect.bisect_left(lengths, length) for lengths, length in zip(self._lengths, first)), last)

    def _bucket(self, examples: Sequence[Example]) -> dict[str, int]:
        """Return {sequence: the shortest bucket length of its side that fits all examples}."""
        extents = [self._extent(example) for example in examples]
        bucket: dict[str, int] = {}
        for side, lengths, found in zip(self._sides, self._lengths, zip(*extents)):
            if max(found) > lengths[-1]:
                raise UserError(f"config.data.ops: {max(found)} tokens, though the op's max_length is {lengths[-1]}")
            bucket |= dict.fromkeys(side, next(length for length in lengths if length >= max(found)))
        return bucket

    def _collate(
        self, examples: Sequence[Example], lengths: dict[str, int], partial: bool = False
    ) -> dict[str, np.ndarray]:
        """Stack examples; sequences are padded to `lengths`. `partial` drops features that an example lacks."""
        names = [n for n in (*self.features, "mask") if not partial or all(n in example for example in examples)]
        for name in names:
            if name not in examples[0]:
                raise UserError(f"config.data.features: examples have no '{name}'{nearest(name, examples[0])}")
        return {name: _stack([self._feature(e[name], lengths, name) for e in examples], name) for name in names}

    def _feature(self, value: Any, lengths: dict[str, int], name: str) -> np.ndarray:
        array = _numbers(value, name)
        return sharding.pad(array[None], lengths[name], self.padding[name])[0] if name in lengths else array

    @functools.cached_property
    def _calls(self) -> tuple[Callable[[Example, np.random.Generator], Any], ...]:
        """The ops, each as a function of an example and a generator; signatures are inspected only once."""
        return tuple(with_rng(op) for op in self.ops)

    @functools.cached_property
    def _one_to_one(self) -> bool:
        """Whether every example becomes one row: no packing, and no op makes a list of the first example."""
        if self.pack or not len(self.source):
            return not self.pack
        example, rng = self.source[0], np.random.default_rng(0)
        for call in self._calls:
            example = call(example, rng)
            if not isinstance(example, dict):
                return False
        return True

    @functools.cached_property
    def _sides(self) -> tuple[dict[str, float], ...]:
        """The `padding` of each side, the decoder's last; empty without sequences."""
        decoder = {n: f for n, f in self.padding.items() if n.startswith(("decoder_", "target"))}
        if "decoder_input_ids" not in decoder:
            decoder = {}
        rest = {name: fill for name, fill in self.padding.items() if name not in decoder}
        return tuple(side for side in (rest, decoder) if side)

    @property
    def _room(self) -> tuple[int, ...]:
        """The length of packed rows on each side."""
        return (self.pack, self.pack_decoder)[: len(self._sides)]

    def _longest(self, side: dict[str, float]) -> int | None:
        """Return the maximum length of a side's sequences as stated by their ops, or None."""
        stated: dict[str, int] = {}
        for op in self.ops:
            own = getattr(op, "decoder_max_length", None) if "decoder_input_ids" in side else None
            made = getattr(op, "padding", {}).keys() & side
            if length := own or getattr(op, "max_length", None):
                stated |= dict.fromkeys(made, length)
        return max(stated.values(), default=None)

    @functools.cached_property
    def _lengths(self) -> tuple[tuple[int, ...], ...]:
        """The lengths of each side, ascending."""
        if self.pack:
            return tuple((room,) for room in self._room)
        keys = ("length_buckets", "decoder_length_buckets")
        return tuple(self._side_lengths(i, key) for i, key in enumerate(keys[: len(self._sides)]))

    def _side_lengths(self, side: int, key: str) -> tuple[int, ...]:
        wanted, longest = getattr(self, key), self._longest(self._sides[side])
        if longest is None:
            raise UserError(
                f"config.data.ops: what makes {', '.join(self._sides[side])} needs a max_length (or `pack`)"
            )
        if isinstance(wanted, tuple):
            if longest > max(wanted):
                raise UserError(f"{key}: {wanted} is shorter than the max_length {longest} of config.data.ops")
            return tuple(sorted(wanted))
        return best_lengths([extent[side] for made in self._sample for extent in made], wanted, longest)

    @functools.cached_property
    def _sample(self) -> list[list[tuple[int, ...]]]:
        """The lengths of the rows of up to SAMPLE examples."""
        order = grain.MapDataset.source(range(len(self.source))).seed(self.seed).shuffle()
        chosen = (self.source[order[i]] for i in range(min(len(self.source), SAMPLE)))
        return [[self._extent(row) for row in self.transform(example)] for example in chosen]

    @functools.cached_property
    def _rows_per_example(self) -> float:
        if self._one_to_one or not len(self.source):
            return 1.0
        extents = [extent for made in self._sample for extent in made]
        rows = len(extents)
        if self.pack:
            lengths = packing.cut(np.array(extents, np.int64).reshape(-1, len(self._sides)).T, self._room)
            rows = int(packing.first_fit(lengths, self._room).max(initial=-1)) + 1
        if not rows:
            raise UserError(f"config.data.ops: they drop all of {len(self._sample)} sampled examples")
        return rows / len(self._sample)


def with_rng(op: Callable[..., Any]) -> Callable[[Example, np.random.Generator], Any]:
    """Return a function that calls an op with a generator if it takes one."""
    if "rng" in inspect.signature(op).parameters:
        return lambda example, rng: op(example, rng=rng)
    return lambda example, rng: op(example)


def _parts(count: int, size: int) -> list[np.ndarray]:
    """Split 0..count - 1, in order, into the fewest parts of at most `size`, as evenly as possible."""
    return np.array_split(np.arange(count), math.ceil(count / size)) if count else []


def _stack(arrays: Sequence[np.ndarray], name: str) -> np.ndarray:
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)) for shape in shapes[:2])
        raise UserError(f"config.data.ops: a batch needs '{name}' of one shape, not of {found}; resize or crop images")
    return np.stack(arrays)


def _numbers(value: Any, name: str) -> np.ndarray:
    """Return a feature as float32, int32 or bool."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise UserError(f"config.data.features: '{name}' is {type(value).__name__}, not numbers")
    kind = np.float32 if array.dtype.kind == "f" else np.int32 if array.dtype.kind in "iu" else bool
    return array.astype(kind, copy=False)


def best_lengths(measured: Sequence[int], count: int, longest: int) -> tuple[int, ...]:
    """Return at most `count` bucket lengths, the last `longest`, that minimise padding (dynamic programming)."""
    frequency = np.bincount(measured, minlength=longest + 1)[: longest + 1]
    examples = np.concatenate([[0], np.cumsum(frequency)])  # examples[l]: number shorter than l
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
    """Flatten lists of batches."""

    max_fan_out = 1_000_000

    def flat_map(self, element: Sequence[Any]) -> Sequence[Any]:
        return element
