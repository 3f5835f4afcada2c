"""The construction of von Oswald 2023, proposition 1: a layer that takes a step of gradient descent."""

import pathlib

import jax
import numpy as np
import pytest

from research import train
from research.analysis.linear_regression import expected_rate, gradient_step
from research.configuration import overrides
from research.configuration.constructed import gradient_descent_step
from research.errors import UserError
from research.models.linear_attention import LinearSelfAttention

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "in_context_gradient_descent.py"
RNG = np.random.default_rng(0)
MODEL = LinearSelfAttention()


def functions(count=5, points=7, dimensions=3):
    x = RNG.uniform(-1, 1, (count, points, dimensions)).astype(np.float32)
    return x, np.einsum("bnd,bd->bn", x, RNG.normal(size=(count, dimensions)).astype(np.float32))


def start(x, y):
    return MODEL.init(jax.random.key(0), x, y)["params"]


def construction(x, y):
    shapes = jax.eval_shape(lambda: start(x, y))
    params, _ = gradient_descent_step(x.shape[2], x.shape[1] - 1, MODEL, shapes)
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    return params


def test_the_construction_is_one_step_of_gradient_descent():
    x, y = functions()
    weights = expected_rate(3, 6) * gradient_step(x, y)
    predictions = MODEL.apply({"params": construction(x, y)}, x, y)
    np.testing.assert_allclose(predictions[:, 0], (weights * x[:, -1]).sum(axis=1), rtol=1e-5, atol=1e-6)


def test_so_are_its_sensitivities():
    x, y = functions()
    params = construction(x, y)
    slopes = jax.grad(lambda x: MODEL.apply({"params": params}, x, y).sum())(x)[:, -1]
    np.testing.assert_allclose(slopes, expected_rate(3, 6) * gradient_step(x, y), rtol=1e-5, atol=1e-6)


def test_a_config_begins_with_the_construction(tmp_path):
    config = overrides.load(f"{CONFIG}:construction")
    config.data.source.count = config.evals.test.data.source.count = 2000
    metrics = train.run(config, tmp_path)["metrics"]
    assert metrics["test/sensitivity_cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["test/loss"] == pytest.approx(metrics["test/step_loss"], rel=0.01)


def test_a_construction_for_another_model():
    x, y = functions()
    shapes = jax.eval_shape(lambda: start(x, y))
    with pytest.raises(UserError, match="LinearSelfAttention is not linear self-attention over 4 dimensions"):
        gradient_descent_step(4, 6, MODEL, shapes)
