"""Self-attention without softmax, which can take a step of gradient descent on what it reads (von Oswald 2023).

Shape letters: B functions, N points, D dimensions, E = D + 1 the width of a token.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.analysis.linear_regression import expected_rate
from research.models.layers import Dense
from research.pretrained.huggingface import Report


class LinearSelfAttention(nn.Module):
    """One layer with one head that predicts a function's value at its last point from the points before it.

    Von Oswald 2023, equations 3 and 5 and proposition 1: tokens are (x, y), that of the last point (x, 0); it adds to
    itself P times the mean over the other tokens of V e (K e . Q e_last). What is predicted is the negative of the last
    number that it then holds.

    Attributes:
      initializer_range: standard deviation of the initial kernels.
    """

    initializer_range: float = 0.1

    @nn.compact
    def __call__(self, inputs_BxNxD: jax.Array, outputs_BxN: jax.Array) -> jax.Array:
        """Map points, float32 [B, N, D] and [B, N], to predictions [B, 1]; the last of the outputs is not read."""
        width, init = inputs_BxNxD.shape[-1] + 1, nn.initializers.normal(self.initializer_range)
        context_BxNxE = jnp.concatenate([inputs_BxNxD, outputs_BxN[..., None]], axis=-1)[:, :-1]
        last_BxE = jnp.pad(inputs_BxNxD[:, -1], ((0, 0), (0, 1)))

        def project(name: str, x: jax.Array) -> jax.Array:
            return Dense(width, use_bias=False, kernel_init=init, name=name)(x)

        scores_BxN = jnp.einsum("bne,be->bn", project("key", context_BxNxE), project("query", last_BxE))
        values_BxE = jnp.einsum("bn,bne->be", scores_BxN, project("value", context_BxNxE)) / context_BxNxE.shape[1]
        return -(last_BxE + project("out", values_BxE))[:, -1:]


def gradient_descent_step(dimensions: int, examples: int, model: Any, params_shape: Any) -> tuple[Any, Report]:
    """Return the parameters with which the layer takes one step of gradient descent from weights of 0, exactly.

    `config.init = dict(call="research.models.linear_attention.gradient_descent_step", dimensions=10, examples=10)`.
    They are those of von Oswald 2023, proposition 1: keys and queries are x, values are -y in the last place, and the
    projection multiplies by the learning rate, the best in expectation for uniform inputs.

    Args:
      dimensions: D.
      examples: N - 1.
      model: a `LinearSelfAttention`.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.
    """
    del model, params_shape  # the width says all
    input_E = np.append(np.ones(dimensions, np.float32), np.float32(0))
    kernels = {"query": np.diag(input_E), "key": np.diag(input_E), "value": np.diag(input_E - 1)}
    kernels["out"] = np.float32(expected_rate(dimensions, examples)) * np.eye(dimensions + 1, dtype=np.float32)
    return {name: {"kernel": kernel} for name, kernel in kernels.items()}, Report((), ())
