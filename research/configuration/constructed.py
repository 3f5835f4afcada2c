"""Parameters that are constructed instead of trained."""

from typing import Any

import jax
import numpy as np

from research.analysis.linear_regression import expected_rate
from research.errors import UserError
from research.pretrained.huggingface import Report


def gradient_descent_step(dimensions: int, examples: int, model: Any, params_shape: Any) -> tuple[Any, Report]:
    """Return the parameters with which linear self-attention takes exactly one step of gradient descent from 0.

    `config.init = dict(call="research.configuration.constructed.gradient_descent_step", dimensions=10, examples=10)`.
    They are those of von Oswald 2023, proposition 1: keys and queries are x, values are -y in the last place, and the
    projection multiplies by the learning rate, the best in expectation for uniform inputs.

    Args:
      dimensions: D.
      examples: N - 1.
      model: a `models.linear_attention.LinearSelfAttention`.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.

    Raises:
      UserError: the model is another one, or of another width.
    """
    input_E = np.append(np.ones(dimensions, np.float32), np.float32(0))
    kernels = {"query": np.diag(input_E), "key": np.diag(input_E), "value": np.diag(input_E - 1)}
    kernels["out"] = np.float32(expected_rate(dimensions, examples)) * np.eye(dimensions + 1, dtype=np.float32)
    tree = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    found, expected = (jax.tree.map(lambda kernel: kernel.shape, each) for each in (tree, dict(params_shape)))
    if found != expected:
        raise UserError(
            f"config.init: {type(model).__name__} is not linear self-attention over {dimensions} dimensions"
        )
    return tree, Report((), ())
