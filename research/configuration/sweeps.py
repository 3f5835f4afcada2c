"""Sweeps: several runs of one config, each with other values of some of its keys.

A config file may define

    def get_sweep() -> Sweep:
        return grid({"optimizer.learning_rate": (1e-4, 3e-4), "task.model.dropout": (0.0, 0.1)}) * seeds(3)

whose points `--mode=sweep` runs: here 2 x 2 x 3. `a * b` combines every point of a with every one of b, `a + b` has the
points of both.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError

Point = Mapping[str, Any]  # a config key, "optimizer.learning_rate", and its value
Distribution = Callable[[np.random.Generator], Any]
LONGEST_NAME = 120  # characters of a point's name


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Points, in the order in which they are run.

    Attributes:
      points: no two are the same.
    """

    points: tuple[Point, ...]

    def __post_init__(self):
        written = [json.dumps(point, sort_keys=True, default=str) for point in self.points]
        if not written:
            raise UserError("a sweep has no points")
        for i, text in enumerate(written):
            if text in written[:i]:
                raise UserError(f"a sweep has the point {text} twice")

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        """Return the points in order."""
        return iter(self.points)

    def __mul__(self, other: "Sweep") -> "Sweep":
        """Return every point of this sweep with every one of the other, whose values count where both have a key."""
        return Sweep(tuple({**one, **two} for one, two in itertools.product(self, other)))

    def __add__(self, other: "Sweep") -> "Sweep":
        """Return the points of both."""
        return Sweep((*self, *other))


def grid(values: Mapping[str, Sequence[Any]]) -> Sweep:
    """Return all combinations of the values of each key; the last key changes fastest."""
    return Sweep(tuple(dict(zip(values, chosen)) for chosen in itertools.product(*values.values())))


def points(*chosen: Point) -> Sweep:
    """Return the points that are listed."""
    return Sweep(chosen)


def seeds(count: int) -> Sweep:
    """Return the seeds 0 to count - 1."""
    return grid({"seed": range(count)})


def sample(count: int, values: Mapping[str, Distribution], seed: int = 0) -> Sweep:
    """Return random points (Bergstra 2012); the first ones stay when `count` grows.

    Args:
      count: how many.
      values: {key: distribution}, such as `log_uniform(1e-5, 1e-3)`.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    return Sweep(tuple({key: draw(rng) for key, draw in values.items()} for _ in range(count)))


def uniform(low: float, high: float) -> Distribution:
    """Return a distribution of numbers of three digits between two."""
    return lambda rng: _short(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Return a distribution of numbers of three digits whose logarithm is uniform between those of two."""
    if not 0 < low <= high:
        raise UserError(f"log_uniform({low}, {high}): both must be above 0, and the first is the smaller")
    return lambda rng: _short(math.exp(rng.uniform(math.log(low), math.log(high))))


def choice(options: Sequence[Any]) -> Distribution:
    """Return a distribution of equally likely values."""
    return lambda rng: options[int(rng.integers(len(options)))]


def names(sweep: Sweep) -> list[str]:
    """Return a name for the folder of each point: "learning_rate=0.001,seed=0".

    A key is called by its last part, or by all of it where another key ends alike.
    """
    keys = list(dict.fromkeys(key for point in sweep for key in point))
    last = [key.rpartition(".")[2] for key in keys]
    short = {key: part if last.count(part) == 1 else key for key, part in zip(keys, last)}
    return [_name({short[key]: value for key, value in point.items()}) for point in sweep]


def _name(point: Point) -> str:
    full = ",".join(f"{key}={as_text(value)}" for key, value in point.items())
    name = re.sub(r"[^\w.,=+-]+", "_", full)
    if name == full and len(name) <= LONGEST_NAME:
        return name or "as-it-is"
    return f"{name[:LONGEST_NAME]}-{hashlib.blake2b(full.encode(), digest_size=4).hexdigest()}"


def as_text(value: Any) -> str:
    """Return a value as --config.KEY=VALUE takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
