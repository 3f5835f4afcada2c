"""The input pipeline: what the ops make of a source, in planned batches.

Ops that draw nothing are applied once, before training, so that the length of every row is known. Batches are planned
from these lengths, and then read: each process reads its own rows, and applies the ops that draw. Batch i is thus a
function of the seed and i, whatever the number of processes, and a run resumes anywhere.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from research.data import batching, collating, columns, packing, prepared, preparing
from research.data.mixture import Joined
from research.data.reading import Batches, Pool
from research.errors import UserError, nearest
from research.task import Spec

Example = dict[str, Any]
SAMPLE = 4096  # maximum number of rows from which lengths are estimated
MEASURED = 4  # rows that are made to see what they cost
HEAVY = 0.1  # seconds of making a batch from which processes of their own do
MOST_WORKERS = 16


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
        applied in turn. Those before the first with a parameter `rng` are applied once; that one and those after it
        whenever a row is read, with a numpy Generator that is a function of (seed, position). They make one row of
        one, and no sequence longer or shorter. An op that does either has instead `prepare`, the part of it that draws
        nothing; `draw`, of what that makes; `prepared`, the name of a sequence that it makes; and `extents`, which
        says of its length, and a generator where that is drawn too, how long both sides will be. One with `padding`
        makes sequences: {feature: fill value}. Its `max_length` is their maximum length; on the decoder's side its
        `decoder_max_length` comes first. The last op that makes a feature counts.
      batch_size: the global batch size.
      seed: for the order and the ops.
      length_buckets: the number of bucket lengths, chosen to minimise padding, or the lengths themselves.
      window: the number of batches sorted by length, or packed, together; of packed ones about as many. The rows of a
        window are distributed evenly; missing rows, fewer than one batch in total, are padding rows with mask 0.
      decoder_length_buckets: the same as `length_buckets` for the decoder's side. The compiled shapes are at most the
        product of both numbers, 12; where long texts have long translations 7 of them occur.
      pack: the length of packed rows; longer sequences are split first; 0 disables packing. Features may then be
        `attention_mask` (1, 2, ... at the documents of a row, 0 where it is empty), `positions` (from 0 in each
        document), `decoder_attention_mask` and `decoder_positions`.
      pack_decoder: the decoder length of packed rows; documents with two sides are not split.
      workers: processes that read batches; 0 leaves that to threads of this one. None takes as many as there are cores
        where ops that are applied to every row are heavy, as images' are, and else 0. The batches are the same.
    """

    source: Source = dataclasses.field(repr=False)
    features: tuple[str, ...]
    ops: tuple[Callable[..., Any], ...] = ()
    batch_size: int = 32
    seed: int = 0
    length_buckets: int | tuple[int, ...] = 4
    window: int = 50
    decoder_length_buckets: int | tuple[int, ...] = 3
    pack: int = 0
    pack_decoder: int = 0
    workers: int | None = None

    def __post_init__(self):
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers: {self.workers} is less than 0")
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
            if (made := self._longest(side)) is not None and made > room:
                raise UserError(f"pack: the ops make {made} tokens, but packed rows hold {room}; pairs are never split")

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
        """The number of rows in an epoch; estimated from a sample where rows are packed."""
        count = len(self._rows) if self.mixture is None else len(self.mixture)
        return round(count * self._packed_rows) if self.pack else count

    @functools.cached_property
    def mixture(self) -> Joined | None:
        """The rows of several sources, mixed as the sources are; None of a single one."""
        return self.source.resized([len(part) for part in self._parts]) if isinstance(self.source, Joined) else None

    @property
    def _ordered(self) -> bool:
        return getattr(self.source, "ordered", False)

    @functools.cached_property
    def spec(self) -> Spec:
        """Feature -> global shape and dtype of the largest batch."""
        rows = (row for i in range(min(len(self.source), SAMPLE)) for row in self.transform(self.source[i]))
        if (first := next((row for row in rows if not self.pack or any(self._extent(row))), None)) is None:
            raise UserError(f"config.data.ops: they drop all of the first {SAMPLE} examples")
        longest = {name: length for side, length in zip(self._sides, self._limits) for name in side}
        batch = self._packed([first]) if self.pack else self._collated([first | {"mask": np.float32(1)}], longest)
        return {k: jax.ShapeDtypeStruct((self.batch_size, *v.shape[1:]), v.dtype) for k, v in batch.items()}

    def transform(self, example: Example, rng: np.random.Generator | None = None) -> list[Example]:
        """Return the examples that the ops make of one example, each op applied to all outputs of the one before."""
        return prepared.apply(self._calls, example, rng)

    def prepare(self) -> int:
        """Prepare ahead of a run, make anew what is damaged, and return the number of rows."""
        return sum(map(len, self._prepared(whole=True)))

    def batches(self) -> Batches:
        """Return this process's share of an endless stream of training batches, reshuffled every epoch.

        The iterator's `get_state` and `set_state` resume it exactly, with any number of processes.
        """
        if len(self.source) == 0:
            raise UserError("config.data: the training data contain no examples")
        return self._iterate(train=True)

    def epoch(self) -> Iterator[dict[str, np.ndarray]]:
        """Return this process's share of the batches of one epoch, which hold every example exactly once.

        All processes get the same number of batches; padding rows have mask 0.
        """
        if self._ordered:
            raise UserError("data.source: a mixture with weights has no end; evaluate one without weights")
        return self._iterate(train=False)

    def rows(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Yield batches of given examples, in order and not packed together (one process only).

        Each batch comes with the index in `examples` of each row; the last batch may be smaller.
        """
        made = ((i, row) for i, example in enumerate(examples) for row in self.transform(example))
        while part := list(itertools.islice(made, self.batch_size)):
            rows = [row | {"mask": np.float32(1)} for _, row in part]
            if self.pack:
                batch = self._packed(rows, apart=True)
            else:
                batch = self._collated(rows, self._bucket(rows), partial=True)
            yield [i for i, _ in part], batch

    def _iterate(self, train: bool) -> Batches:
        plan = self._plan(train)
        return Batches(plan.batches, self._share, functools.partial(self._read, size=self._own_size), self._pool)

    @property
    def _own_size(self) -> int:
        """How many rows of a batch this process reads."""
        return self.batch_size // jax.process_count()

    @functools.cached_property
    def _pool(self) -> Pool | None:
        """The processes that read, started once for all iterators; None where threads do."""
        count = self._needed_workers(self._own_size) if self.workers is None else self.workers
        return Pool(functools.partial(self._read, size=self._own_size), count) if count else None

    def _needed_workers(self, size: int) -> int:
        """Return how many processes should read: none where a few rows say that a batch takes little time to make."""
        cores = preparing.cores()
        if cores == 1 or not (self._stages[1] or isinstance(self._rows, prepared.Unprepared)):
            return 0
        count = min(len(self._rows), MEASURED)
        rows = np.arange(count)
        few = batching.Batch(rows, rows, self._extents(rows, rows), ())
        _ = self._drawn(few.part(0, 1))  # the first time is another
        begin = time.perf_counter()
        _ = self._drawn(few)
        seconds = (time.perf_counter() - begin) / max(count, 1) * size
        return min(cores, MOST_WORKERS) if seconds > HEAVY else 0

    def __getstate__(self) -> dict[str, Any]:
        """Return what a process that reads needs: the fields, and the rows that are prepared."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return kept | ({"_parts": self._parts} if "_parts" in vars(self) else {})

    def _plan(self, train: bool) -> batching.Plan:
        _ = self._limits  # raises where a side has none
        self._check_features()
        lengths = self._lengths if self.padding else ()
        window = self.window * self.batch_size if self.padding else self.batch_size
        if self.pack:
            window = max(round(window / self._packed_rows), 1)
        return batching.Plan(
            count=len(self._rows),
            extents=self._extents,
            batch_size=self.batch_size,
            window=window,
            lengths=lengths,
            packed=bool(self.pack),
            seed=self.seed,
            train=train,
            order=self._mixed if self._ordered else None,
        )

    def _mixed(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows [N] of a mixture with weights at positions [N]."""
        assert self.mixture is not None
        sources, rows = self.mixture.locate(positions)
        starts = np.cumsum([0, *(len(part) for part in self._parts)])
        return starts[sources] + rows

    def _check_features(self) -> None:
        """Raise UserError if the first row lacks a feature."""
        row = next(iter(self.transform(self.source[0])), {}) if len(self.source) else {}
        for name in self.features if row else ():
            if name not in row and not (self.pack and name in packing.MADE):
                raise UserError(f"config.data.features: examples have no '{name}'{nearest(name, row)}")

    def _share(self, batch: batching.Batch) -> tuple[batching.Batch, batching.Batch | None]:
        """Return this process's part of a batch, and the first row where padding rows, which are like it, are added."""
        size = self._own_size
        own = batch.part(jax.process_index() * size, (jax.process_index() + 1) * size)
        return own, batch.part(0, 1) if own.pieces is None and len(own.rows) < size else None

    def _read(self, own: batching.Batch, first: batching.Batch | None, size: int) -> dict[str, np.ndarray]:
        """Return `size` rows, those of `own` and padding."""
        if own.pieces is not None:
            return self._laid(own, size)
        rows = [row | {"mask": np.float32(1)} for row in self._drawn(own)]
        if first is not None:
            rows += [self._filler(self._drawn(first)[0])] * (size - len(rows))
        lengths = {name: length for side, length in zip(self._sides, own.lengths) for name in side}
        return self._collated(rows, lengths)

    def _laid(self, batch: batching.Batch, size: int) -> dict[str, np.ndarray]:
        """Return the rows of a packed batch."""
        assert batch.pieces is not None
        if self._stages[1]:
            values = packing.of_examples(self._drawn(batch), batch.pieces)
        else:
            values = functools.partial(self._gathered, batch)
        laid = packing.lay(batch.pieces, self._sides, self._room, size, values)
        return {name: collating.numbers(value, name) for name, value in laid.items()}

    def _gathered(self, batch: batching.Batch, name: str, lengths: np.ndarray) -> np.ndarray:
        assert batch.pieces is not None
        return self._rows.gather(name, batch.rows[batch.pieces.documents], batch.pieces.begins, lengths)

    def _drawn(self, batch: batching.Batch) -> list[Example]:
        """Return the rows of a batch, with what is drawn for their positions."""
        drawn = []
        for row, position, planned in zip(batch.rows.tolist(), batch.positions.tolist(), batch.extents.T.tolist()):
            example = self._rows[row]
            for number, call in enumerate(self._stages[1]):
                example = call(example, np.random.default_rng((self.seed, position, number)))
                if not isinstance(example, dict):
                    raise UserError(
                        "config.data.ops: one that draws, or comes after one that does, makes a list; split it into "
                        "`prepare`, which draws nothing, and `draw`"
                    )
            if self._stages[1] and list(found := self._extent(example)) != planned:
                found_planned = (" and ".join(map(str, lengths)) for lengths in (found, planned))
                raise UserError(
                    "config.data.ops: a row has {} tokens, and {} were planned; an op that draws lengths says them by "
                    "`extents`".format(*found_planned)
                )
            drawn.append(example)
        return drawn

    def _extents(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the lengths [S, N] that rows [N] have at positions [N]."""
        if (op := self._splitter) is None:
            return np.stack([side[rows] for side in self._measured]) if self._sides else np.zeros((0, len(rows)), int)
        lengths = self._measured[0][rows]
        if prepared.draws(op.extents):
            drawn = (np.random.default_rng((self.seed, position, 0)) for position in positions.tolist())
            both = np.array([op.extents(length, rng) for length, rng in zip(lengths.tolist(), drawn)], np.int64)
        else:
            distinct, places = np.unique(lengths, return_inverse=True)
            both = np.array([op.extents(length) for length in distinct.tolist()], np.int64)[places]
        return both.reshape(-1, 2).T[: len(self._sides)]

    def _filler(self, row: Example) -> Example:
        """Return a row of the same length that holds only padding."""
        empty = {name: np.full_like(np.asarray(row[name]), fill) for name, fill in self.padding.items() if name in row}
        return row | empty | {"mask": np.float32(0)}

    def _packed(self, examples: Sequence[Example], apart: bool = False) -> dict[str, np.ndarray]:
        """Return rows of examples, packed together or `apart`; those to predict for may lack features."""
        sides = self._sides
        if apart:
            given = [{n: f for n, f in side.items() if n in packing.MADE or n in examples[0]} for side in sides]
            sides = tuple(side for side in given if side.keys() - packing.MADE)
        packed = packing.pack(examples, sides, self._room, apart)
        return {name: collating.numbers(value[:-1], name) for name, value in packed.items()}

    def _extent(self, example: Example) -> tuple[int, ...]:
        """Return the length of each side."""
        return tuple(max((len(example[name]) for name in side if name in example), default=0) for side in self._sides)

    def _bucket(self, examples: Sequence[Example]) -> dict[str, int]:
        """Return {sequence: the shortest bucket length of its side that fits all examples}."""
        found = zip(*(self._extent(example) for example in examples))
        sides = zip(self._sides, self._lengths if self.padding else (), found)
        return {name: batching.bucket(max(side_found), lengths) for side, lengths, side_found in sides for name in side}

    def _collated(
        self, rows: Sequence[Example], lengths: dict[str, int], partial: bool = False
    ) -> dict[str, np.ndarray]:
        return collating.collate(rows, (*self.features, "mask"), lengths, self.padding, partial)

    @functools.cached_property
    def _stages(self) -> tuple[list[Callable[..., Any]], list[prepared.Call]]:
        """The ops that draw nothing, and calls of those from the first one on that draws."""
        first = next((i for i, op in enumerate(self.ops) if prepared.draws(op)), len(self.ops))
        fixed, drawing = list(self.ops[:first]), list(self.ops[first:])
        if self._splitter is not None:
            fixed, drawing = [*fixed, self._splitter.prepare], [self._splitter.draw, *drawing[1:]]
        return fixed, [prepared.with_rng(op) for op in drawing]

    @functools.cached_property
    def _calls(self) -> list[prepared.Call]:
        """All ops."""
        return [prepared.with_rng(op) for op in self.ops]

    @functools.cached_property
    def _splitter(self) -> Any:
        """The first op that draws if it makes lists or lengths, else None."""
        first = next((op for op in self.ops if prepared.draws(op)), None)
        return first if hasattr(first, "extents") else None

    @functools.cached_property
    def _parts(self) -> list[prepared.Rows]:
        """What the ops that draw nothing make of each source."""
        return self._prepared(whole=False)

    def _prepared(self, whole: bool) -> list[prepared.Rows]:
        (fixed, drawing), made = self._stages, packing.MADE if self.pack else ()
        features = [name for name in self.features if name not in made]
        sources = self.source.sources if isinstance(self.source, Joined) else {"the data": self.source}
        of_one = functools.partial(
            prepared.rows, ops=fixed, features=features, drawn=bool(drawing), lengths=bool(self.padding), whole=whole
        )
        parts = [of_one(source, name=name) for name, source in sources.items()]
        if len(self.source) and not all(map(len, parts)):
            raise UserError(f"config.data.ops: they drop all of {len(self.source)} examples")
        return parts

    @functools.cached_property
    def _rows(self) -> prepared.Rows:
        """The rows of all sources."""
        return columns.Joined(self._parts) if len(self._parts) > 1 else self._parts[0]

    @functools.cached_property
    def _measured(self) -> np.ndarray:
        """The lengths [S, N] of what is prepared of all rows."""
        names = [[self._splitter.prepared]] if self._splitter is not None else [list(side) for side in self._sides]
        return np.stack([self._rows.lengths(side) for side in names])

    @functools.cached_property
    def _packed_rows(self) -> float:
        """How many packed rows a row that is prepared takes."""
        count = min(len(self._rows), SAMPLE)
        some = np.random.default_rng(self.seed).permutation(len(self._rows))[:count]
        chosen = self._mixed(np.arange(count)) if self._ordered else some
        pieces = packing.assign(self._extents(chosen, np.arange(count)), self._room)
        return max(pieces.count, 1) / max(count, 1)

    @functools.cached_property
    def _sides(self) -> tuple[dict[str, float], ...]:
        """The `padding` of each side, the decoder's last; empty without sequences."""
        paired = "decoder_input_ids" in self.padding
        decoder = {n: f for n, f in self.padding.items() if paired and n.startswith(("decoder_", "target"))}
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

    @property
    def _limits(self) -> tuple[int, ...]:
        """The length of the longest sequence on each side."""
        return self._room if self.pack else tuple(self._limit(side) for side in self._sides)

    def _limit(self, side: dict[str, float]) -> int:
        if (longest := self._longest(side)) is None:
            raise UserError(f"config.data.ops: what makes {', '.join(side)} needs a max_length (or `pack`)")
        return longest

    def _side_lengths(self, side: int, key: str) -> tuple[int, ...]:
        wanted, longest = getattr(self, key), self._limit(self._sides[side])
        if isinstance(wanted, tuple):
            if longest > max(wanted):
                raise UserError(f"{key}: {wanted} is shorter than the max_length {longest} of config.data.ops")
            return tuple(sorted(wanted))
        count = len(self._rows) if self._splitter is None else min(len(self._rows), SAMPLE)
        return batching.best_lengths(self._extents(np.arange(count), np.arange(count))[side], wanted, longest)
