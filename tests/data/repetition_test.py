import numpy as np
import pytest

from research.data.repetition import repeated_tokens
from research.errors import UserError


def test_what_counts_is_what_the_repetition_says_and_no_more():
    source = repeated_tokens(count=50, vocab_size=1000, length=40, shortest=6)
    periods = set()
    for example in (source[i] for i in range(50)):
        tokens = np.append(example["input_ids"], example["targets"][-1])
        np.testing.assert_array_equal(tokens[1:], example["targets"])
        period = 40 - int(example["target_mask"].sum())
        periods.add(period)
        assert 6 <= period <= 34
        np.testing.assert_array_equal(tokens[period:], tokens[: 41 - period])
        np.testing.assert_array_equal(example["target_mask"], np.arange(40) >= period)
    assert len(periods) > 10


def test_a_sequence_is_a_function_of_seed_and_position():
    first, again, other = (repeated_tokens(count=9, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[5]["input_ids"], again[5]["input_ids"])
    assert (first[5]["input_ids"] != first[6]["input_ids"]).any()
    assert (first[5]["input_ids"] != other[5]["input_ids"]).any()
    with pytest.raises(IndexError):
        first[9]
    for arguments in ({"shortest": 33}, {"vocab_size": 1}, {"count": 0}):
        with pytest.raises(UserError):
            repeated_tokens(**arguments)
