import numpy as np
import pytest

from research.evaluators.superposition import interference, measures


def test_orthogonal_features_have_a_dimension_each():
    kernel = np.zeros((20, 5))
    kernel[:5] = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    found = measures(kernel)
    assert (found["represented_features"], found["dimensions_per_feature"]) == (5, pytest.approx(1))
    assert found["interference"] == pytest.approx(0, abs=1e-12)


def test_antipodal_pairs_have_half_a_dimension_each():
    found = measures(np.concatenate([np.eye(3), -np.eye(3), np.zeros((2, 3))]))
    assert found == {"represented_features": 6, "dimensions_per_feature": 0.5, "interference": 1}


def test_interference_is_that_of_the_unit_direction_with_the_others():
    kernel = np.array([[2.0, 0.0], [0.6, 0.8], [0.0, 0.0]])
    np.testing.assert_allclose(interference(kernel), [0.36, 1.44, 0])


def test_a_kernel_of_nothing():
    found = measures(np.full((4, 2), 1e-6))
    assert (found["represented_features"], found["interference"]) == (0, 0)
    assert found["dimensions_per_feature"] > 1e6
