"""Several sources as one: one after the other, or mixed by weights.

A mixture with weights is a sequence without end. Which source a position has follows from the weights alone: after n
positions every source has had its share of n, to within the number of sources, so that any run of positions has the
proportions of the weights. Which example it has follows from the seed: the k-th visit to a source of N examples takes
the (k mod N)-th of a permutation of (seed, source, k // N). Nothing is counted on the way, so that any position can be
asked for at any time, in any order and by any process.

It is therefore in order already (`ordered`): a reader takes the positions 0, 1, 2, ... and may reorder those that it
has taken, as windows sorted by length do, but must neither permute positions across windows, which would blur the
proportions and move examples over a change of the weights, nor begin again at `len`. Where examples become several
rows, the dataset mixes rows in this way, so that weights are shares of rows.

Weights may change when a run is resumed, from a step on that it has not passed: the positions before stay what they
were. Where the change falls into a window of batches of which the run has had a part, the window is cut anew, so that
some of its examples come twice and some not at all; `from_step` at the beginning of a later window avoids it.
"""

import bisect
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError, nearest

CALL = "research.data.source.mixture"
PARTS = 2**20  # weights become whole numbers of this many parts, so that proportions are exact at any position
BLOCK = 128  # positions that are located together, which takes about three times as long as one alone
GAMMA = np.uint64(0x9E3779B97F4A7C15)  # between the keys of rounds, as in SplitMix64

Example = dict[str, Any]
Weights = Mapping[str, Any] | Sequence[Mapping[str, Any]]  # {name: weight}, or phases of such


@dataclasses.dataclass(frozen=True)
class Joined:
    """Sources one after the other: each example once, as evaluation wants it; training shuffles them together.

    Attributes:
      sources: {name: random access to examples}, in the order of their names.
    """

    sources: Mapping[str, Any] = dataclasses.field(repr=False)

    ordered = False

    def __post_init__(self):
        object.__setattr__(self, "sources", dict(sorted(self.sources.items())))
        _check_features(self.sources)
        _ = self.label_names  # whose differences are an error

    def __len__(self) -> int:
        """The number of examples."""
        return sum(self._lengths)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Return the example at a position."""
        (source,), (record,) = self.locate([index])
        return self._values[source][int(record)]

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return of each position the number of its source, in the order of `sources`, and of its example there.

        Raises:
          IndexError: a position is out of range.
        """
        at = self._checked(positions)
        if len(at) and at.max() >= len(self):
            raise IndexError(f"index {at.max()} is out of range: there are {len(self)} examples")
        ends = np.cumsum(self._lengths)
        found = np.searchsorted(ends, at, side="right")
        return found, at - (ends - self._lengths)[found]

    def resized(self, lengths: Sequence[int]) -> "Joined":
        """Return the same mixture of sources of other lengths, to be located and not read."""
        made = copy.copy(self)
        vars(made)["_lengths"] = np.array(lengths, np.int64)  # the cached property
        return made

    def epochs(self, position: int) -> dict[str, float]:
        """Return how often each source has been seen when an endless reader has come to a position."""
        return dict.fromkeys(self.sources, position / len(self))

    @functools.cached_property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """The class names of each feature, which are those of all sources."""
        names: dict[str, tuple[str, ...]] = {}
        for name, source in self.sources.items():
            for feature, classes in getattr(source, "label_names", {}).items():
                if names.setdefault(feature, tuple(classes)) != tuple(classes):
                    raise UserError(f"sources: the classes of '{feature}' in '{name}' are not those of the others")
        return names

    @functools.cached_property
    def _values(self) -> tuple[Any, ...]:
        return tuple(self.sources.values())

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(source) for source in self._values], np.int64)

    def _checked(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        at = np.asarray(positions, np.int64)
        if len(at) and at.min() < 0:
            raise IndexError(f"index {at.min()} is out of range")
        return at


@dataclasses.dataclass(frozen=True)
class Mixture(Joined):
    """Sources mixed by weights, without end; see above.

    Attributes:
      phases: [(first position, {name: parts})], ascending, the first from 0. A phase goes on in every source where the
        one before stopped, and does not touch those that it does not name.
      seed: of the permutations.
    """

    phases: tuple[tuple[int, Mapping[str, int]], ...]
    seed: int = 0

    ordered = True

    def __len__(self) -> int:
        """The least number of positions after which each source of the first phase has been seen once.

        Later phases do not change it, so that the length of a run that is stated in epochs is not moved by them.
        """
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Return the example at a position."""
        (at,) = self._checked([index]).tolist()
        sources, records = self._block(at // BLOCK)
        return self._values[sources[at % BLOCK]][int(records[at % BLOCK])]

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Joined.locate`; no position is too great."""
        at = self._checked(positions)
        sources, visits = np.zeros_like(at), np.zeros_like(at)
        phase = np.searchsorted([start for start, _ in self.phases], at, side="right") - 1
        for number in np.unique(phase):
            here = phase == number
            found, count = _interleave(at[here] - self.phases[number][0], self._parts[number])
            sources[here], visits[here] = found, count + self._before[number][found]
        epoch, index = np.divmod(visits, self._lengths[sources])
        records = permuted(index, self._lengths[sources], _hash(self._keys[sources] + epoch.astype(np.uint64)))
        return sources, records

    def epochs(self, position: int) -> dict[str, float]:
        """See `Joined.epochs`."""
        number = bisect.bisect_right([start for start, _ in self.phases], position) - 1
        start, _ = self.phases[number]
        seen = self._before[number] + _counts(int(position) - start, self._parts[number])
        return dict(zip(self.sources, (seen / self._lengths).tolist()))

    @functools.cached_property
    def _block(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """Of the positions of a block, as `locate`; the last few blocks are kept, as positions are read in order."""
        return functools.lru_cache(128)(lambda block: self.locate(np.arange(block * BLOCK, (block + 1) * BLOCK)))

    @functools.cached_property
    def _length(self) -> int:
        parts = self._parts[0]
        low, high = 0, int(max((n * parts.sum() // p + len(parts) for n, p in zip(self._lengths, parts) if p)))
        wanted = np.where(parts > 0, self._lengths, 0)
        every = range(low, high + 1)
        return bisect.bisect_left(every, True, key=lambda n: bool((_counts(n, parts) >= wanted).all()))

    @functools.cached_property
    def _parts(self) -> tuple[np.ndarray, ...]:
        return tuple(np.array([parts.get(name, 0) for name in self.sources], np.int64) for _, parts in self.phases)

    @functools.cached_property
    def _before(self) -> tuple[np.ndarray, ...]:
        """The visits to each source before each phase."""
        starts = [start for start, _ in self.phases]
        made = [_counts(end - start, parts) for start, end, parts in zip(starts, starts[1:], self._parts)]
        return tuple(np.cumsum([np.zeros(len(self.sources), np.int64), *made], axis=0))

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.random.SeedSequence(self.seed).generate_state(len(self.sources), np.uint64)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def make_mixture(sources: Mapping[str, Any], weights: Weights, seed: int, examples_per_step: float) -> Joined:
    """Return what `source.mixture` does, which see."""
    if not sources:
        raise UserError("sources: there are none")
    if not weights:
        return Joined(sources)
    given: list[Mapping[str, Any]]
    given = [{"from_step": 0, "weights": weights}] if isinstance(weights, Mapping) else list(weights)
    if len(given) > 1 and not examples_per_step > 0:
        raise UserError(
            "examples_per_step: it is missing, and weights that change need it: the batch size, or where rows are "
            "packed train/source_examples of metrics.jsonl, divided by the step"
        )
    starts, phases = [], []
    for phase in given:
        if set(phase) != {"from_step", "weights"}:
            raise UserError(f"weights: a phase has from_step and weights, not {', '.join(sorted(phase))}")
        starts.append(phase["from_step"])
        phases.append((round(phase["from_step"] * examples_per_step), _parts_of(phase["weights"], sources)))
    if starts[0] != 0 or any(later <= start for start, later in itertools.pairwise(starts)):
        raise UserError(f"weights: from_step must begin at 0 and ascend, not {', '.join(map(str, starts))}")
    if unused := sorted(set(sources) - {name for _, parts in phases for name in parts}):
        raise UserError(f"weights: there is none for '{unused[0]}'")
    return Mixture(sources, phases=tuple(phases), seed=seed)


def with_new_weights(old: Any, new: Any, step: int) -> Any:
    """Return the config `old` with those weights of mixtures in `new` that are other ones from `step` on only.

    Args:
      old, new: nodes of the config of one run, before and after.
      step: to which the run has come.
    """
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return old
    made = {key: with_new_weights(value, new.get(key), step) for key, value in old.items()}
    if old.get("call") == new.get("call") == CALL and _weights_until(old, step) == _weights_until(new, step):
        free = ("weights", "examples_per_step")
        made = {key: value for key, value in made.items() if key not in free}
        made |= {key: new[key] for key in free if key in new}
    return made


def _weights_until(node: Mapping[str, Any], step: int) -> Any:
    """Return what decides which examples the first steps of a run have."""
    weights = node.get("weights") or ()
    phases: list[Mapping[str, Any]]
    phases = [{"from_step": 0, "weights": weights}] if isinstance(weights, Mapping) else list(weights)
    used = [phase for phase in phases if phase.get("from_step", 0) < max(step, 1)]
    return used, node.get("examples_per_step") if len(used) > 1 else None


def _parts_of(weights: Mapping[str, float], sources: Mapping[str, Any]) -> dict[str, int]:
    """Return whole numbers that are as the weights."""
    for name, weight in weights.items():
        if name not in sources:
            raise UserError(f"weights: no source '{name}'{nearest(name, sources)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"weights: that of '{name}' is {weight!r}; it must be a number greater than 0")
    total = sum(weights.values())
    return {name: max(round(weight / total * PARTS), 1) for name, weight in weights.items()}


def _check_features(sources: Mapping[str, Any]) -> None:
    """Raise a UserError if a source is empty, or has not the features that another has."""
    features: dict[str, set[str]] = {}
    for name, source in sources.items():
        if not len(source):
            raise UserError(f"sources: '{name}' has no examples")
        features[name] = set(source[0])
    for name, has in features.items():
        for other, wanted in features.items():
            if missing := sorted(wanted - has):
                raise UserError(f"sources: the examples of '{name}' have no '{missing[0]}', but those of '{other}' do")


def _interleave(positions: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each position the number of its source, and how often that had come before.

    The first source takes the positions at which its share of them grows to the next whole number; the next does so
    with the positions that are left, and so on.
    """
    found, counts = np.zeros_like(positions), np.zeros_like(positions)
    open_, left = np.arange(len(positions)), positions
    for number, part in enumerate(parts):
        rest = int(parts[number:].sum())
        if not part:
            continue
        before, after = left * part // rest, (left + 1) * part // rest
        taken = after > before
        found[open_[taken]], counts[open_[taken]] = number, before[taken]
        open_, left = open_[~taken], (left - before)[~taken]
    return found, counts


def _counts(position: int, parts: np.ndarray) -> np.ndarray:
    """Return how often each source comes before a position."""
    counts, left = np.zeros(len(parts), np.int64), position
    for number, part in enumerate(parts.tolist()):
        if part:
            counts[number] = left * part // int(parts[number:].sum())
            left -= int(counts[number])
    return counts


def permuted(index: np.ndarray, length: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return where a permutation of 0..length - 1, one of each key, puts an index.

    A Feistel network over the next power of two; what falls outside goes through it again. No table is held, which for
    a billion examples would take 8 GB.

    Args:
      index: int64 [N].
      length: int64 [N], of the permutations.
      key: uint64 [N].
    """
    bits = np.maximum(np.frexp(length - 1)[1], 4).astype(np.uint64)  # fewer make some orders of three likelier
    low = bits // np.uint64(2)
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << (bits - low)) - np.uint64(1)
    found, todo = index.astype(np.uint64), np.arange(len(index))
    while len(todo):
        own, shift, left_mask, right_mask = key[todo], low[todo], high_mask[todo], low_mask[todo]
        left, right = found[todo] >> shift, found[todo] & right_mask
        for _ in range(4):
            left ^= _hash(right ^ (own := own + GAMMA)) & left_mask
            right ^= _hash(left ^ (own := own + GAMMA)) & right_mask
        found[todo] = left << shift | right
        todo = todo[found[todo] >= length[todo].astype(np.uint64)]
    return found.astype(np.int64)


def _hash(value: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits of each (the finalizer of SplitMix64); products wrap around."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
