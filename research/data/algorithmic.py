"""Algorithmic datasets: modular arithmetic, on which generalisation comes long after memorisation (grokking).

Power et al. (2022), "Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets".
"""

from collections.abc import Callable

import numpy as np

from research.data.source import Source
from research.errors import UserError, nearest

SPLITS = ("train", "validation")


def modular_arithmetic(
    operation: str = "division", modulus: int = 97, train_share: float = 0.5, split: str = "train", seed: int = 0
) -> Source:
    """Return a split of all equations `a op b = c` modulo a number, for a causal language model.

    Every token is an id: the numbers are themselves, `op` is `modulus` and `=` is `modulus + 1`, so that the
    vocabulary has `modulus + 2`. Features: `input_ids` int32 [4], `a op b =`; `targets` int32 [4], `op b = c`;
    `target_mask` float32 [4], 1 at `c` alone.

    Args:
      operation: "addition", "subtraction", "multiplication", or "division", which leaves out b = 0.
      modulus: must be a prime for division.
      train_share: the fraction of equations for training, chosen by `seed`; the rest is "validation".
      split: "train" or "validation".
      seed: of the random split.

    Raises:
      UserError: an argument is invalid.
    """
    operations: dict[str, Callable[[int, int], int]] = {
        "addition": lambda a, b: (a + b) % modulus,
        "subtraction": lambda a, b: (a - b) % modulus,
        "multiplication": lambda a, b: a * b % modulus,
        "division": lambda a, b: a * pow(b, -1, modulus) % modulus,
    }
    if operation not in operations:
        raise UserError(f"operation: unknown '{operation}'{nearest(operation, operations)}")
    if split not in SPLITS:
        raise UserError(f"modular arithmetic has no split '{split}'{nearest(split, SPLITS)}")
    if modulus < 2:
        raise UserError(f"modulus: {modulus} is less than 2")
    if operation == "division" and any(modulus % factor == 0 for factor in range(2, modulus)):
        raise UserError(f"modulus: {modulus} is not prime, which division requires")
    compute, first = operations[operation], int(operation == "division")
    pairs = [(a, b) for a in range(modulus) for b in range(first, modulus)]
    size = round(train_share * len(pairs))
    if not 0 < size < len(pairs):
        raise UserError(f"train_share: {train_share} of {len(pairs)} equations leaves one of the two splits empty")
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = order[:size] if split == "train" else order[size:]
    return Source([_equation([a, modulus, b, modulus + 1, compute(a, b)]) for a, b in (pairs[i] for i in chosen)])


def _equation(ids: list[int]) -> dict[str, np.ndarray]:
    tokens = np.array(ids, np.int32)
    return {"input_ids": tokens[:-1], "targets": tokens[1:], "target_mask": np.array([0, 0, 0, 1], np.float32)}
