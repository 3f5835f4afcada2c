import numpy as np
import pytest

from research.analysis import attention_flow


def test_rollout_of_two_layers_by_hand():
    first = np.array([[1.0, 0.0], [0.5, 0.5]])
    second = np.array([[0.2, 0.8], [0.6, 0.4]])
    weights = np.stack([[first, first], [second + 0.1 * (second - 0.5), second - 0.1 * (second - 0.5)]])
    # Halves of the weights and of the identity: [[1, 0], [.25, .75]], then [[.6, .4], [.3, .7]].
    found = attention_flow.rollout(weights)
    np.testing.assert_allclose(found[0], [[1.0, 0.0], [0.25, 0.75]])
    np.testing.assert_allclose(found[1], [[0.7, 0.3], [0.475, 0.525]])


def test_rows_sum_to_one_and_causal_stays_causal():
    scores = np.random.default_rng(0).normal(size=(5, 3, 7, 7)).astype(np.float32)
    weights = np.exp(scores) * np.tri(7, dtype=np.float32)
    weights /= weights.sum(axis=-1, keepdims=True)
    found = attention_flow.rollout(weights)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-12)
    assert (found * (1 - np.tri(7)) == 0).all()


def test_row():
    matrix = np.arange(9.0).reshape(3, 3)
    assert attention_flow.row(matrix, 1).tolist() == [3, 4, 5]
    assert attention_flow.row(matrix, None).tolist() == [3, 4, 5]
    assert attention_flow.row(matrix, None, np.array([True, False, False])).tolist() == pytest.approx([0, 1, 2])
