"""Bidirectional encoders of the BERT kind: BERT (Devlin 2018), RoBERTa (Liu 2019) and DistilBERT (Sanh 2019).

They differ in three places only: whether there are token types, where positions begin, and the shape of the head.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models import layers
from research.models.attention import Attention
from research.models.blocks import Block, stack
from research.models.positions import sinusoids
from research.models.structure import Structure


class Embeddings(nn.Module):
    """The sum of word, position and token-type embeddings, normalised; the fields are those of `Encoder`."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    num_token_types: int
    position_offset: int | None
    layer_norm_epsilon: float
    dropout: float
    dtype: Any
    kernel_init: layers.Initializer
    position_init: layers.Initializer

    def setup(self):
        """Make the tables."""
        table = functools.partial(layers.Embedding, features=self.hidden_size, embedding_init=self.kernel_init)
        self.word = table(self.vocab_size)
        self.position = table(self.max_positions, embedding_init=self.position_init)
        if self.num_token_types:
            self.token_type = table(self.num_token_types)
        self.norm = layers.LayerNorm(self.layer_norm_epsilon, dtype=self.dtype)
        self.drop = layers.Dropout(self.dropout, name="dropout")

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        token_type_ids_BxT: jax.Array | None,
        positions_BxT: jax.Array | None,
    ) -> jax.Array:
        """Map token ids [B, T] to [B, T, D]."""
        x_BxTxD = self.word(input_ids_BxT) + self._positions(input_ids_BxT, positions_BxT)
        if self.num_token_types:
            x_BxTxD += self.token_type.first() if token_type_ids_BxT is None else self.token_type(token_type_ids_BxT)
        return self.drop(self.norm(x_BxTxD))

    def _positions(self, input_ids_BxT: jax.Array, positions_BxT: jax.Array | None) -> jax.Array:
        """Embed positions, from 0; or, with an offset p, as RoBERTa: padding, id p, at p, the rest from p + 1 on."""
        if positions_BxT is not None:
            return self.position(positions_BxT + (0 if self.position_offset is None else self.position_offset + 1))
        if self.position_offset is None:
            return self.position(jnp.broadcast_to(jnp.arange(input_ids_BxT.shape[1]), input_ids_BxT.shape))
        real_BxT = (input_ids_BxT != self.position_offset).astype(jnp.int32)
        return self.position(jnp.cumsum(real_BxT, axis=1) * real_BxT + self.position_offset)


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
      sinusoidal_start: whether the table of positions begins as sinusoids, as large, and is learned from there.
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
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
    sinusoidal_start: bool = False
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        """Make the embeddings and a block."""
        dtype, kernel_init = jnp.dtype(self.dtype), nn.initializers.normal(self.initializer_range)
        self.embeddings = Embeddings(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_positions=self.max_positions,
            num_token_types=self.num_token_types,
            position_offset=self.position_offset,
            layer_norm_epsilon=self.layer_norm_epsilon,
            dropout=self.dropout,
            dtype=dtype,
            kernel_init=kernel_init,
            position_init=self._sinusoids if self.sinusoidal_start else kernel_init,
        )
        shared: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init}
        self.layers = Block(
            attention=functools.partial(
                Attention,
                self.num_heads,
                dropout=self.attention_dropout,
                implementation=self.attention,
                remat=self.remat,
                **shared,
            ),
            mlp=functools.partial(layers.MLP, self.intermediate_size, self.activation, **shared),
            norm=functools.partial(layers.LayerNorm, self.layer_norm_epsilon, dtype=dtype),
            norms="sum",
            dropout=self.dropout,
        )

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to hidden states [B, T, D] in `dtype`.

        Tokens attend to those of the same non-zero number in `attention_mask_BxT`: 1 at every token but padding, or the
        number of the document where several are packed into one row, which then needs `positions_BxT`. Where it is
        None, all attend to all.
        """
        x_BxTxD = self.embeddings(input_ids_BxT, token_type_ids_BxT, positions_BxT)
        structure = Structure.within(
            attention_mask_BxT, input_ids_BxT.shape[1], causal=False, packed=positions_BxT is not None
        )
        return stack(self.layers, self.num_layers, x_BxTxD, structure=structure, unroll=self.unroll, remat=self.remat)

    def _sinusoids(self, key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        """Initialise positions such that those at any one distance are the same rotation apart."""
        del key
        return self.initializer_range * 2**0.5 * sinusoids(jnp.arange(shape[0]), shape[1]).astype(dtype)


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
        """Map token ids int32 [B, T] to logits float32 [B, num_outputs]."""
        hidden_BxTxD = self.encoder(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT)
        first_BxD = layers.Dropout(self.head_input_dropout, name="head_input_dropout")(hidden_BxTxD[:, 0])
        width, dtype = first_BxD.shape[-1], first_BxD.dtype
        pooled_BxD = layers.activation(self.head_activation)(
            layers.Dense(width, dtype=dtype, name="head_dense")(first_BxD)
        )
        pooled_BxD = layers.Dropout(self.head_dropout, name="head_dropout")(pooled_BxD)
        return layers.Dense(self.num_outputs, name="head_output")(pooled_BxD.astype(jnp.float32))


class TokenClassifier(nn.Module):
    """An encoder and a linear layer on every token (Devlin 2018, section 5.3).

    Attributes:
      encoder: maps (input_ids, attention_mask, token_type_ids) to [B, T, D].
      num_outputs: classes.
      head_dropout: before the layer.
    """

    encoder: nn.Module
    num_outputs: int
    head_dropout: float = 0.1

    @nn.compact
    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to logits float32 [B, T, num_outputs]."""
        hidden_BxTxD = self.encoder(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT)
        hidden_BxTxD = layers.Dropout(self.head_dropout, name="head_dropout")(hidden_BxTxD)
        return layers.Dense(self.num_outputs, name="head_output")(hidden_BxTxD.astype(jnp.float32))


class QuestionAnswerer(TokenClassifier):
    """An encoder that scores every token as the start and as the end of the answer (Devlin 2018, section 4.2)."""

    num_outputs: int = 2
    head_dropout: float = 0.0


class MaskedLM(nn.Module):
    """An encoder that predicts tokens: a dense layer, its activation, a norm, then the word table (Devlin 2018, 3.1).

    Attributes:
      encoder: an `Encoder`.
      head_activation: of the head's dense layer.
      tie_embeddings: whether the output layer's weights are the word table; else it has its own.
    """

    encoder: Encoder
    head_activation: str = "gelu"
    tie_embeddings: bool = True

    def setup(self):
        """Make the head."""
        encoder = self.encoder
        dtype, kernel_init = jnp.dtype(encoder.dtype), nn.initializers.normal(encoder.initializer_range)
        self.head_dense = layers.Dense(encoder.hidden_size, dtype=dtype, kernel_init=kernel_init)
        self.head_norm = layers.LayerNorm(encoder.layer_norm_epsilon)
        self.head_bias = self.param("head_bias", nn.initializers.zeros, (encoder.vocab_size,), jnp.float32)
        if not self.tie_embeddings:
            self.head_output = layers.Dense(encoder.vocab_size, False, kernel_init=kernel_init)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to logits float32 [B, T, V]."""
        return self.logits(self.hidden(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT, positions_BxT))

    def hidden(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array | None = None,
        token_type_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to the encoder's hidden states [B, T, D]."""
        return self.encoder(input_ids_BxT, attention_mask_BxT, token_type_ids_BxT, positions_BxT)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states [..., D] to logits float32 [..., V]."""
        hidden = self.head_norm(layers.activation(self.head_activation)(self.head_dense(hidden)))
        if self.tie_embeddings:
            return self.words().attend(hidden) + self.head_bias
        return self.head_output(hidden).astype(jnp.float32) + self.head_bias

    def words(self) -> layers.Embedding:
        """Return the word table."""
        return self.encoder.embeddings.word
