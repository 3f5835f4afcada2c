"""Bidirectional encoders of the BERT kind: BERT (Devlin 2018), RoBERTa (Liu 2019) and DistilBERT (Sanh 2019).

They differ in three places only: whether there are token types, where positions begin, and the shape of the head.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models import layers


class Embeddings(nn.Module):
    """The sum of word, position and token-type embeddings, normalised."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    num_token_types: int
    position_offset: int | None
    layer_norm_epsilon: float
    dropout: float
    dtype: Any
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        token_type_ids_BxT: jax.Array | None,
        positions_BxT: jax.Array | None,
    ) -> jax.Array:
        """Maps token ids [B, T] to [B, T, D]."""
        if positions_BxT is None:
            positions_BxT = self._positions(input_ids_BxT)

        def embed(size: int, ids: jax.Array, name: str) -> jax.Array:
            return layers.Embedding(size, self.hidden_size, embedding_init=self.kernel_init, name=name)(ids)

        x_BxTxD = embed(self.vocab_size, input_ids_BxT, "word") + embed(self.max_positions, positions_BxT, "position")
        if self.num_token_types:
            if token_type_ids_BxT is None:
                token_type_ids_BxT = jnp.zeros_like(input_ids_BxT)
            x_BxTxD += embed(self.num_token_types, token_type_ids_BxT, "token_type")
        x_BxTxD = layers.LayerNorm(self.layer_norm_epsilon, dtype=self.dtype, name="norm")(x_BxTxD)
        return layers.Dropout(self.dropout, name="dropout")(x_BxTxD)

    def _positions(self, input_ids_BxT: jax.Array) -> jax.Array:
        """Positions from 0; or, with an offset p, RoBERTa's: padding (id p) sits at p, the rest counts from p + 1."""
        if self.position_offset is None:
            return jnp.broadcast_to(jnp.arange(input_ids_BxT.shape[1]), input_ids_BxT.shape)
        real_BxT = (input_ids_BxT != self.position_offset).astype(jnp.int32)
        return jnp.cumsum(real_BxT, axis=1) * real_BxT + self.position_offset


class Encoder(nn.Module):
    """The encoder of BERT and its kin.

    Attributes:
      vocab_size: rows of the word table.
      hidden_size: D, a multiple of `num_heads`.
      num_layers: blocks.
      num_heads: H.
      intermediate_size: F.
      max_positions: rows of the position table; RoBERTa's counts its offset too.
      num_token_types: rows of the token-type table; 0 leaves the table out (DistilBERT).
      position_offset: None, or the padding id after which RoBERTa's positions begin.
      activation: of the MLP, by its Hugging Face name.
      layer_norm_epsilon: of every norm.
      dropout: after the embeddings and before each residual sum.
      attention_dropout: on the attention weights.
      initializer_range: standard deviation of the normal initialisation of kernels and tables.
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once.
      remat: recompute activations in the backward pass.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    num_token_types: int = 2
    position_offset: int | None = None
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    dtype: str = "float32"
    unroll: int = 1
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Maps token ids int32 [B, T] to hidden states [B, T, D] in `dtype`.

        `attention_mask_BxT` is true (or 1) at tokens that may be attended to; all may where it is None.
        """
        dtype, kernel_init = jnp.dtype(self.dtype), nn.initializers.normal(self.initializer_range)
        x_BxTxD = Embeddings(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_positions=self.max_positions,
            num_token_types=self.num_token_types,
            position_offset=self.position_offset,
            layer_norm_epsilon=self.layer_norm_epsilon,
            dropout=self.dropout,
            dtype=dtype,
            kernel_init=kernel_init,
            name="embeddings",
        )(input_ids_BxT, token_type_ids_BxT, positions_BxT)
        mask = None if attention_mask_BxT is None else attention_mask_BxT[:, None, None, :].astype(bool)
        block = layers.PostNormBlock(
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            activation=self.activation,
            layer_norm_epsilon=self.layer_norm_epsilon,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=dtype,
            kernel_init=kernel_init,
            name="layers",
        )
        return layers.stack(block, self.num_layers, x_BxTxD, mask, unroll=self.unroll, remat=self.remat)


class SequenceClassifier(nn.Module):
    """An encoder and a two-layer head on its first token.

    BERT's head is its pretrained pooler (tanh) and a linear layer; RoBERTa's is a fresh tanh layer with dropout before
    it too; DistilBERT's is a fresh ReLU layer.

    Attributes:
      encoder: maps (input_ids, attention_mask, token_type_ids) to [B, T, D].
      num_outputs: classes, labels or regression targets.
      head_activation: between the head's two layers.
      head_dropout: before the last layer.
      head_input_dropout: before the first layer.
    """

    encoder: nn.Module
    num_outputs: int
    head_activation: str = "tanh"
    head_dropout: float = 0.1
    head_input_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Maps token ids int32 [B, T] to logits float32 [B, num_outputs]."""
        hidden_BxTxD = self.encoder(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT)
        first_BxD = layers.Dropout(self.head_input_dropout, name="head_input_dropout")(hidden_BxTxD[:, 0])
        width, dtype = first_BxD.shape[-1], first_BxD.dtype
        pooled_BxD = layers.activation(self.head_activation)(
            layers.Dense(width, dtype=dtype, name="head_dense")(first_BxD)
        )
        pooled_BxD = layers.Dropout(self.head_dropout, name="head_dropout")(pooled_BxD)
        return layers.Dense(self.num_outputs, name="head_output")(pooled_BxD.astype(jnp.float32))
