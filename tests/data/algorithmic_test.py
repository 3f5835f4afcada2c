"""Modular arithmetic: every equation once, right, and only its answer counted."""

import numpy as np
import pytest

from research.data.algorithmic import modular_arithmetic
from research.errors import UserError

CHECKS = {
    "addition": lambda a, b, c: (a + b - c) % 13 == 0,
    "subtraction": lambda a, b, c: (a - b - c) % 13 == 0,
    "multiplication": lambda a, b, c: (a * b - c) % 13 == 0,
    "division": lambda a, b, c: (b * c - a) % 13 == 0 and b != 0,
}


@pytest.mark.parametrize("operation", CHECKS)
def test_every_equation_is_in_one_split_and_right(operation):
    equations = []
    for split in ("train", "validation"):
        for example in modular_arithmetic(operation, 13, 0.3, split):
            a, op, b, equals = map(int, example["input_ids"])
            assert (op, equals) == (13, 14)
            np.testing.assert_array_equal(example["targets"][:-1], example["input_ids"][1:])
            np.testing.assert_array_equal(example["target_mask"], [0, 0, 0, 1])
            answer = int(example["targets"][-1])
            assert 0 <= answer < 13
            assert CHECKS[operation](a, b, answer)
            equations.append((a, b))
    assert len(equations) == len(set(equations)) == 13 * (12 if operation == "division" else 13)


def test_dtypes_sizes_and_seeds():
    example = modular_arithmetic()[0]
    assert {name: (value.dtype, value.shape) for name, value in example.items()} == {
        "input_ids": (np.int32, (4,)),
        "targets": (np.int32, (4,)),
        "target_mask": (np.float32, (4,)),
    }
    assert len(modular_arithmetic()) == 97 * 96 / 2
    first, same, other = ([tuple(e["input_ids"]) for e in modular_arithmetic(seed=seed)] for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "adition"}, "operation: unknown 'adition'; did you mean 'addition'"),
        ({"split": "test"}, "no split 'test'"),
        ({"modulus": 91}, "modulus: 91 is not prime, which division requires"),
        ({"modulus": 1}, "modulus: 1 is less than 2"),
        ({"train_share": 1.0}, "train_share: 1.0 of 9312 equations leaves one of the two splits empty"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        modular_arithmetic(**arguments)
