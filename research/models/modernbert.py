"""ModernBERT (Warner 2024): an encoder whose layers attend to all tokens and to near ones by turns."""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.models import bert, layers
from research.models.attention import Attention
from research.models.blocks import Block, stack
from research.models.positions import positions, rotary_angles
from research.models.structure import Structure

POOLINGS = ("cls", "mean")


class Encoder(nn.Module):
    """The encoder of ModernBERT; its defaults are the base model's.

    Its first block has no norm before attention, and is `first`; `layers` are the others.

    Attributes:
      vocab_size: rows of the word table.
      hidden_size: D, a multiple of `num_heads`.
      num_layers: blocks.
      num_heads: H.
      intermediate_size: F, of a gated MLP.
      max_positions: the longest text.
      global_every: of so many layers the first attends to all tokens, the others to near ones.
      local_window: a token is near if it stands at most half of this away.
      global_theta: base of the rotary wavelengths of layers that attend to all tokens.
      local_theta: base of those of the others.
      activation: of the MLP's gate, by its Hugging Face name.
      layer_norm_epsilon: of every norm.
      norm_bias: whether norms shift.
      attention_bias: of the projections of attention.
      mlp_bias: of the MLP.
      dropout: after the embeddings.
      attention_dropout: on the attention weights.
      mlp_dropout: on the MLP's hidden layer.
      initializer_range: standard deviation of the initial kernels and tables; of those that end in a residual sum it is
        divided by sqrt(2 layers).
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    num_layers: int = 22
    num_heads: int = 12
    intermediate_size: int = 1152
    max_positions: int = 8192
    global_every: int = 3
    local_window: int = 128
    global_theta: float = 160000.0
    local_theta: float = 10000.0
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    initializer_range: float = 0.02
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        """Make the table, the first block, a later one, and the norms at both ends."""
        dtype, init = jnp.dtype(self.dtype), nn.initializers.normal(self.initializer_range)
        out_init = nn.initializers.normal(self.initializer_range / (2 * self.num_layers) ** 0.5)
        norm = functools.partial(layers.LayerNorm, self.layer_norm_epsilon, dtype, self.norm_bias)
        shared: dict[str, Any] = {"dtype": dtype, "kernel_init": init, "out_init": out_init}
        block = functools.partial(
            Block,
            attention=functools.partial(
                Attention,
                self.num_heads,
                use_bias=self.attention_bias,
                out_bias=self.attention_bias,
                dropout=self.attention_dropout,
                implementation=self.attention,
                remat=self.remat,
                **shared,
            ),
            mlp=functools.partial(
                layers.MLP, self.intermediate_size, self.activation, True, self.mlp_bias, self.mlp_dropout, **shared
            ),
        )
        self.word = layers.Embedding(self.vocab_size, self.hidden_size, dtype, init)
        self.norm_in, self.norm_out, self.drop = norm(), norm(), layers.Dropout(self.dropout)
        self.first = block(norm=functools.partial(_but_before_attention, norm))
        if self.num_layers > 1:
            self.layers = block(norm=norm)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to hidden states [B, T, D] in `dtype`; the mask is that of `bert.Encoder`."""
        length, width = input_ids_BxT.shape[1], self.hidden_size // self.num_heads
        structure = Structure.within(attention_mask_BxT, length, causal=False, packed=positions_BxT is not None)
        if positions_BxT is None:
            positions_BxT = positions(attention_mask_BxT, input_ids_BxT.shape)
        thetas = self.global_theta, self.local_theta
        every, own = (rotary_angles(positions_BxT, width, theta) for theta in thetas)
        x_BxTxD = self.drop(self.norm_in(self.word(input_ids_BxT)))
        x_BxTxD = self.first(x_BxTxD, structure=structure, rotary=every)
        if (rest := self.num_layers - 1) > 0:
            x_BxTxD = stack(
                self.layers,
                rest,
                x_BxTxD,
                unroll=self.unroll,
                remat=self.remat,
                each={"local": np.arange(1, self.num_layers) % self.global_every != 0},
                structure=dataclasses.replace(structure, window=self.local_window // 2 + 1),
                rotary=every,
                local_rotary=own,
            )
        return self.norm_out(x_BxTxD)


def _but_before_attention(norm: Any, name: str) -> Any:
    """Return the norm of that name; none before attention, whose input the embeddings have normalised already."""
    return (lambda x: x) if name == "attention_norm" else norm(name=name)


class MaskedLM(bert.MaskedLM):
    """An encoder that predicts tokens, as BERT's does: a dense layer, its activation, a norm, and the word table."""

    encoder: Encoder  # type: ignore[assignment]

    def setup(self):
        """Make the head."""
        encoder = self.encoder
        init = nn.initializers.normal(encoder.initializer_range)
        self.head_dense = layers.Dense(encoder.hidden_size, False, jnp.dtype(encoder.dtype), init)
        self.head_norm = layers.LayerNorm(encoder.layer_norm_epsilon, use_bias=encoder.norm_bias)
        self.head_bias = self.param("head_bias", nn.initializers.zeros, (encoder.vocab_size,), jnp.float32)
        if not self.tie_embeddings:
            self.head_output = layers.Dense(encoder.vocab_size, False, kernel_init=init)

    def hidden(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to the encoder's hidden states [B, T, D]; there are no token types."""
        del token_type_ids_BxT
        return self.encoder(input_ids_BxT, attention_mask_BxT, positions_BxT)

    def words(self) -> layers.Embedding:
        """Return the word table."""
        return self.encoder.word


class SequenceClassifier(nn.Module):
    """An encoder, one vector a text, and a head of two layers, the first of which is the masked language model's.

    Attributes:
      encoder: the encoder.
      num_outputs: classes, labels or regression targets.
      pooling: what a text's vector is: the first token, "cls", or the "mean" of all.
      head_activation: between the head's two layers.
      head_dropout: before the last layer.
    """

    encoder: Encoder
    num_outputs: int
    pooling: str = "cls"
    head_activation: str = "gelu"
    head_dropout: float = 0.0

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    @nn.compact
    def __call__(self, input_ids_BxT: jax.Array, attention_mask_BxT: jax.Array | None = None) -> jax.Array:
        """Map token ids int32 [B, T] to logits float32 [B, num_outputs]."""
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling: unknown '{self.pooling}'{nearest(self.pooling, POOLINGS)}")
        encoder = self.encoder
        hidden_BxTxD = encoder(input_ids_BxT, attention_mask_BxT)
        if self.pooling == "cls":
            pooled_BxD = hidden_BxTxD[:, 0]
        else:
            real = jnp.ones_like(input_ids_BxT) if attention_mask_BxT is None else attention_mask_BxT != 0
            pooled_BxD = jnp.mean(hidden_BxTxD, axis=1, where=real.astype(bool)[..., None])
        init = nn.initializers.normal(encoder.initializer_range)
        dense = layers.Dense(encoder.hidden_size, False, pooled_BxD.dtype, init, name="head_dense")
        pooled_BxD = layers.activation(self.head_activation)(dense(pooled_BxD))
        norm = layers.LayerNorm(encoder.layer_norm_epsilon, use_bias=encoder.norm_bias, name="head_norm")
        pooled_BxD = layers.Dropout(self.head_dropout, name="head_dropout")(norm(pooled_BxD))
        return layers.Dense(self.num_outputs, name="head_output")(pooled_BxD)
