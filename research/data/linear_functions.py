"""Random linear functions, each shown by a few points: tasks to be learned in context (Garg 2022; von Oswald 2023)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.data.source import Source
from research.errors import UserError, nearest

INPUTS = ("normal", "uniform")


def linear_functions(
    count: int = 10_000_000,
    dimensions: int = 5,
    points: int = 11,
    inputs: str = "normal",
    seed: int = 0,
) -> Source:
    """Return points (x, w x) of linear functions, one function an example, without noise.

    Features: `inputs` float32 [points, dimensions]; `outputs` float32 [points]. The weights w are standard normal.

    Args:
      count: functions; each is a function of `seed` and its position.
      dimensions: of x.
      points: of each function.
      inputs: how each number of x is drawn: "normal", of variance 1 (Garg 2022, section 2), or "uniform" in [-1, 1)
        (von Oswald 2023, section 3).
      seed: of all draws.

    Raises:
      UserError: an argument is out of range.
    """
    if inputs not in INPUTS:
        raise UserError(f"inputs: unknown '{inputs}'{nearest(inputs, INPUTS)}")
    if min(count, dimensions, points) < 1:
        raise UserError(f"count, dimensions and points: {count}, {dimensions} and {points} must be at least 1")
    return Source(_Functions(count, dimensions, points, inputs, seed))


@dataclasses.dataclass(frozen=True)
class _Functions(Sequence[Mapping[str, Any]]):
    """The functions, drawn when they are asked for."""

    size: int
    dimensions: int
    points: int
    inputs: str
    seed: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        rng, shape = np.random.default_rng((self.seed, index)), (self.points, self.dimensions)
        weights_D = rng.standard_normal(self.dimensions, np.float32)
        if self.inputs == "normal":
            inputs_NxD = rng.standard_normal(shape, np.float32)
        else:
            inputs_NxD = 2 * rng.random(shape, np.float32) - 1
        return {"inputs": inputs_NxD, "outputs": inputs_NxD @ weights_D}
