"""A decoder of points of a function, which predicts each value from the points before it (Garg 2022).

Shape letters: B functions, N points, F dimensions of an input; else as in `layers`, with T = 2 N.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models import layers
from research.models.attention import Attention
from research.models.blocks import Block, stack
from research.models.structure import Structure


class InContextDecoder(nn.Module):
    """GPT-2's blocks over the sequence x_1, y_1, x_2, y_2, ...; what is read off at x_i predicts y_i.

    Garg 2022, section 2 and appendix A.1: values are made as wide as inputs by zeros behind them, both are mapped
    linearly to the hidden states, and these linearly to a number.

    Attributes:
      max_points: the most points that there are learned positions for.
      hidden_size: D.
      num_layers: blocks.
      num_heads: H.
      intermediate_size: F of the MLP.
      initializer_range: standard deviation of the initial kernels and positions.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
    """

    max_points: int
    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 2
    intermediate_size: int = 256
    initializer_range: float = 0.02
    unroll: int | None = None

    @nn.compact
    def __call__(self, inputs_BxNxF: jax.Array, outputs_BxN: jax.Array) -> jax.Array:
        """Map points, float32 [B, N, F] and [B, N], to the predictions [B, N] of each output from what comes before."""
        init = nn.initializers.normal(self.initializer_range)
        batch, points, features = inputs_BxNxF.shape
        values_BxNxF = jnp.pad(outputs_BxN[..., None], ((0, 0), (0, 0), (0, features - 1)))
        tokens_BxTxF = jnp.stack([inputs_BxNxF, values_BxNxF], axis=2).reshape(batch, 2 * points, features)
        x_BxTxD = layers.Dense(self.hidden_size, kernel_init=init, name="read_in")(tokens_BxTxF)
        position = self.param("position", init, (2 * self.max_points, self.hidden_size), jnp.float32)
        x_BxTxD += layers.for_each(position[: 2 * points], batch)
        shared: dict[str, Any] = {"kernel_init": init}
        block = Block(
            attention=functools.partial(Attention, self.num_heads, **shared),
            mlp=functools.partial(layers.MLP, self.intermediate_size, "gelu_new", **shared),
            norm=layers.LayerNorm,
            name="layers",
        )
        causal = Structure.within(None, 2 * points, causal=True)
        x_BxTxD = stack(block, self.num_layers, x_BxTxD, unroll=self.unroll, structure=causal)
        x_BxNxD = layers.LayerNorm(name="norm")(x_BxTxD[:, ::2])
        return layers.Dense(1, kernel_init=init, name="read_out")(x_BxNxD)[..., 0]
