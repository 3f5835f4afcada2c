"""Self-attention without softmax, which can take a step of gradient descent on what it reads (von Oswald 2023).

Shape letters: B functions, N points, D dimensions, E = D + 1 the width of a token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models.layers import Dense


class LinearSelfAttention(nn.Module):
    """One layer with one head that predicts a function's value at its last point from the points before it.

    Von Oswald 2023, section 2: tokens are (x, y), that of the last point (x, 0), to which it adds P times the mean over
    the other tokens e of V e (K e . Q e_last). What is predicted is the negative of the last number that it then holds.

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
