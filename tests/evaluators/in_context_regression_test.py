import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.analysis.linear_regression import averaging, expected_error, expected_rate, least_squares
from research.configuration.constructed import gradient_descent_step
from research.data.dataset import Dataset
from research.data.linear_functions import linear_functions
from research.errors import UserError
from research.evaluators.in_context_regression import ErrorByExamples, GradientDescent, baselines
from research.models.linear_attention import LinearSelfAttention
from research.tasks.in_context_regression import InContextRegression


class Zero(nn.Module):
    """Predicts 0."""

    @nn.compact
    def __call__(self, inputs, outputs):
        return self.param("zero", nn.initializers.zeros, ()) * outputs


def data(count, **arguments):
    return Dataset(linear_functions(count=count, **arguments), ("inputs", "outputs"), batch_size=64)


def test_errors_by_examples_are_normalised_and_beside_least_squares():
    dataset = data(500, dimensions=4, points=7)
    evaluator = ErrorByExamples(InContextRegression(Zero()), sharding.make_mesh(), dataset)
    found = dict(evaluator({"zero": jnp.zeros(())}))
    rows = [dataset.source[i] for i in range(500)]
    x, y = (np.stack([row[name] for row in rows]) for name in ("inputs", "outputs"))
    for k in range(7):
        assert found[f"error_after_{k}"] == pytest.approx(np.square(y[:, k]).mean() / 4, rel=1e-5)
    assert found["loss"] == pytest.approx(np.square(y).mean(), rel=1e-5)
    assert found["by_examples"].dtype == np.uint8
    best, mean = (np.square(estimator(x, y) - y).mean(axis=0) / 4 for estimator in (least_squares, averaging))
    assert found["excess"] == pytest.approx(np.square(y).mean() / 4 - best.mean(), rel=1e-5)
    curves = baselines(x, y)
    np.testing.assert_allclose(curves["least squares"], best)
    np.testing.assert_allclose(curves["averaging"], mean)
    assert best[6] < 1e-9 < mean[6]


def test_the_construction_is_the_step_itself():
    dataset = data(2000, dimensions=5, points=9, inputs="uniform")
    task = InContextRegression(LinearSelfAttention())
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), dataset.spec))
    params, _ = gradient_descent_step(5, 8, task.model, shapes)
    found = GradientDescent(task, sharding.make_mesh(), dataset)(params)
    assert found["step_rate"] == pytest.approx(expected_rate(5, 8), rel=0.1)
    assert found["step_loss"] == pytest.approx(expected_error(5, 8), rel=0.15)
    assert found["step_loss"] <= found["loss"] == pytest.approx(found["step_loss"], rel=0.01)
    assert found["sensitivity_cosine"] == pytest.approx(1, abs=1e-5)
    share = abs(found["step_rate"] / expected_rate(5, 8) - 1)  # what is left is the difference of the two rates
    assert found["prediction_difference"] < 2 * share
    assert found["sensitivity_difference"] < 3 * share
    wrong = params | {"out": {"kernel": -params["out"]["kernel"]}}
    found = GradientDescent(task, sharding.make_mesh(), dataset)(wrong)
    assert found["sensitivity_cosine"] == pytest.approx(-1, abs=1e-5)
    assert found["loss"] > 2 * found["step_loss"]


def test_errors_by_examples_need_predictions_of_all_points():
    dataset = data(64, dimensions=2, points=4)
    task = InContextRegression(LinearSelfAttention())
    params = task.init(jax.random.key(0), dataset.spec)
    with pytest.raises(UserError, match="LinearSelfAttention predicts 1 of 4 points; errors by examples need all"):
        ErrorByExamples(task, sharding.make_mesh(), dataset)(params)
