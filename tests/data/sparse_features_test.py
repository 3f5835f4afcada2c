import numpy as np
import pytest

from research.data.sparse_features import sparse_features
from research.errors import UserError


def rows(count, **arguments):
    source = sparse_features(count=count, **arguments)
    return np.stack([source[i]["features"] for i in range(count)])


@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.99])
def test_features_are_absent_as_often_as_asked_and_else_uniform(sparsity):
    values = rows(2000, features=20, sparsity=sparsity)
    assert values.shape == (2000, 20)
    assert values.dtype == np.float32
    present = values[values > 0]
    assert present.size / values.size == pytest.approx(1 - sparsity, abs=0.01)
    assert present.mean() == pytest.approx(0.5, abs=0.05)
    assert present.var() == pytest.approx(1 / 12, abs=0.02)
    assert 0 <= values.min() <= values.max() < 1


def test_features_are_independent():
    values = rows(4000, features=3, sparsity=0.5)
    np.testing.assert_allclose(np.corrcoef(values.T), np.eye(3), atol=0.06)


def test_a_vector_is_a_function_of_seed_and_position():
    first, again, other = (rows(5, sparsity=0.5, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(first, rows(7, sparsity=0.5)[:5])
    with pytest.raises(IndexError):
        sparse_features(count=5)[5]


@pytest.mark.parametrize("arguments", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"count": 0}, {"features": 0}])
def test_wrong_arguments(arguments):
    with pytest.raises(UserError, match=f"{next(iter(arguments))}.*must"):
        sparse_features(**arguments)
