import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from research.analysis import linear_regression

RNG = np.random.default_rng(0)


def functions(count, points, dimensions, uniform=False):
    x = RNG.uniform(-1, 1, (count, points, dimensions)) if uniform else RNG.normal(size=(count, points, dimensions))
    return x, np.einsum("bnd,bd->bn", x, RNG.normal(size=(count, dimensions)))


def test_least_squares_is_scikit_learns_where_it_is_determined():
    x, y = functions(4, 7, 3)
    y += RNG.normal(size=y.shape)
    predictions = linear_regression.least_squares(x, y)
    for b in range(4):
        for i in range(3, 7):
            fitted = LinearRegression(fit_intercept=False).fit(x[b, :i], y[b, :i])
            assert predictions[b, i] == pytest.approx(fitted.predict(x[b, i : i + 1])[0])


def test_least_squares_has_the_least_norm_where_it_is_not():
    x, y = functions(1, 3, 5)
    predictions = linear_regression.least_squares(x, y)[0]
    assert predictions[0] == 0
    assert predictions[1] == pytest.approx(y[0, 0] * (x[0, 0] @ x[0, 1]) / (x[0, 0] @ x[0, 0]))


def test_least_squares_is_exact_from_as_many_examples_as_dimensions():
    x, y = functions(2000, 8, 4)
    errors = np.square(linear_regression.least_squares(x, y) - y).mean(axis=0) / 4
    assert errors[4:].max() < 1e-12
    np.testing.assert_allclose(errors[:4], [1, 0.75, 0.5, 0.25], rtol=0.15)  # the dimensions that are left


def test_estimators_do_not_see_what_they_predict():
    x, y = functions(3, 6, 2)
    for estimator in (linear_regression.least_squares, linear_regression.averaging):
        changed = y.copy()
        changed[:, 4:] += 10
        np.testing.assert_allclose(estimator(x, y)[:, :5], estimator(x, changed)[:, :5], atol=1e-12)


def test_averaging_is_the_mean_of_products():
    x, y = functions(2, 5, 3)
    weights = (y[:, :4, None] * x[:, :4]).mean(axis=1)
    np.testing.assert_allclose(linear_regression.averaging(x, y)[:, 4], (weights * x[:, 4]).sum(axis=1))


def test_a_step_goes_down_the_gradient_of_half_the_mean_squared_error():
    x, y = functions(1, 5, 3)
    step = linear_regression.gradient_step(x, y)[0]

    def loss(weights):
        return np.square(x[0, :4] @ weights - y[0, :4]).mean() / 2

    slopes = [(loss(1e-5 * e) - loss(-1e-5 * e)) / 2e-5 for e in np.eye(3)]
    np.testing.assert_allclose(step, -np.array(slopes), atol=1e-8)


def test_the_expected_rate_and_error_are_those_of_many_functions():
    x, y = functions(100_000, 11, 10, uniform=True)
    predictions = (linear_regression.gradient_step(x, y) * x[:, -1]).sum(axis=1)
    rate = linear_regression.best_rate(predictions, y[:, -1])
    assert rate == pytest.approx(linear_regression.expected_rate(10, 10), rel=0.02)
    error = np.square(rate * predictions - y[:, -1]).mean()
    assert error == pytest.approx(linear_regression.expected_error(10, 10), rel=0.03)
    for other in (0.9 * rate, 1.1 * rate):
        assert np.square(other * predictions - y[:, -1]).mean() > error
