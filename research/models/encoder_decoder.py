"""Encoder-decoders: the original Transformer (Vaswani 2017), as Marian has it, T5 (Raffel 2019), BART (Lewis 2019)."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError, nearest
from research.models import layers
from research.models.attention import Attention, CacheIndex
from research.models.blocks import Block, stack
from research.models.positions import RelativeBias, positions, sinusoids
from research.models.structure import EVERYTHING, Structure

POSITIONS = ("sinusoidal", "learned", "relative")
SIDES = ("encoder", "decoder")


class Stack(nn.Module):
    """The blocks of one side with what is around them; its fields are made by `EncoderDecoder`.

    Attributes:
      block: makes a block.
      num_layers: how many.
      norm: makes the norm at the end; None for none.
      relative_bias: makes the bias of T5; None for none.
      causal: whether tokens attend to no later ones.
      dropout: at the beginning, and at the end where there is a norm.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
    """

    block: Any
    num_layers: int
    norm: Any
    relative_bias: Any
    causal: bool
    dropout: float
    unroll: int | None
    remat: str

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        numbers_BxS: jax.Array | None,
        *,
        source_BxSxD: jax.Array | None = None,
        source_structure: Structure = EVERYTHING,
        index: jax.Array | None = None,
        packed: bool = False,
    ) -> jax.Array:
        """Map [B, T, D] to [B, T, D]; see `structure.Structure.within` for `numbers_BxS`, `index` and `packed`."""
        length, start = x_BxTxD.shape[1], 0 if index is None else index
        structure = Structure.within(numbers_BxS, length, causal=self.causal, index=index, packed=packed)
        bias = None
        if self.relative_bias:
            keys = length if numbers_BxS is None else numbers_BxS.shape[1]
            bias = self.relative_bias(bidirectional=not self.causal, name="relative_bias")(length, keys, start)
        x_BxTxD = stack(
            self.block(name="layers"),
            self.num_layers,
            layers.Dropout(self.dropout, name="dropout")(x_BxTxD),
            structure=structure,
            bias=bias,
            source_BxSxD=source_BxSxD,
            source_structure=source_structure,
            index=index,
            unroll=self.unroll,
            remat=self.remat,
        )
        if self.norm is None:
            return x_BxTxD
        return layers.Dropout(self.dropout, name="out_dropout")(self.norm(name="norm")(x_BxTxD))


class EncoderDecoder(nn.Module):
    """An encoder, and a decoder that attends to it; one word table for both. Its defaults are those of Vaswani's base.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      num_layers: blocks of the encoder.
      num_decoder_layers: blocks of the decoder; as many as the encoder's where it is None.
      num_heads: H.
      head_width: K; D / H where it is None.
      intermediate_size: F.
      positions: "sinusoidal", added to the embeddings; "learned", likewise, from a table of each side's own; or
        "relative", T5's bias, with its scores not scaled down.
      max_positions: the longest sequence of either side that there are learned positions for.
      embedding_norm: whether the sum of word and position embeddings is normalised (Lewis 2019).
      relative_buckets: of T5's bias.
      relative_max_distance: of T5's bias.
      norm: "layer" or "rms".
      norm_first: normalise before each part of a block and at the end, or after each residual sum.
      norm_epsilon: of every norm.
      activation: of the MLP, by its Hugging Face name.
      gated: whether the MLP has a gate.
      use_bias: of all linear layers in the blocks.
      tie_embeddings: whether the output layer's weights are the word table.
      embedding_scale: what word embeddings are multiplied by; None for sqrt(D).
      logits_scale: what hidden states are multiplied by before the output layer.
      logits_bias: whether a bias is added to the logits.
      dropout: after the embeddings, before each residual sum, and after the last norm.
      attention_dropout: on the attention weights.
      activation_dropout: on the MLP's hidden layer.
      initializer_range: standard deviation of the initial kernels and tables; where it is None, that which keeps the
        variance of what goes through at 1: 1 / sqrt(inputs) (T5's, and near Vaswani's).
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
    """

    vocab_size: int = 37000
    hidden_size: int = 512
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    head_width: int | None = None
    intermediate_size: int = 2048
    positions: str = "sinusoidal"
    max_positions: int = 1024
    embedding_norm: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm: str = "layer"
    norm_first: bool = False
    norm_epsilon: float = 1e-5
    activation: str = "relu"
    gated: bool = False
    use_bias: bool = True
    tie_embeddings: bool = True
    embedding_scale: float | None = None
    logits_scale: float = 1.0
    logits_bias: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    initializer_range: float | None = None
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        """Make the word table, both stacks and the output layer."""
        if self.positions not in POSITIONS:
            raise UserError(f"unknown positions '{self.positions}'{nearest(self.positions, POSITIONS)}")
        dtype, relative = jnp.dtype(self.dtype), self.positions == "relative"
        scale = math.sqrt(self.hidden_size) if self.embedding_scale is None else self.embedding_scale
        kernel_init = query_init = nn.initializers.normal(self.initializer_range or 0.0)
        table_init = kernel_init
        if self.initializer_range is None:
            kernel_init = query_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            table_init = nn.initializers.normal(1.0 / scale)
            if relative:  # scores are not scaled down, so that queries must be
                width = self.head_width or self.hidden_size // self.num_heads
                query_init = nn.initializers.variance_scaling(1.0 / width, "fan_in", "normal")
        norm = functools.partial(layers.norm(self.norm), self.norm_epsilon, dtype=dtype)
        shared: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init}
        stack = functools.partial(
            Stack,
            functools.partial(
                Block,
                attention=functools.partial(
                    Attention,
                    self.num_heads,
                    head_width=self.head_width,
                    use_bias=self.use_bias,
                    out_bias=self.use_bias,
                    scale=1.0 if relative else None,
                    dropout=self.attention_dropout,
                    implementation=self.attention,
                    remat=self.remat,
                    query_init=query_init,
                    **shared,
                ),
                mlp=functools.partial(
                    layers.MLP,
                    self.intermediate_size,
                    self.activation,
                    self.gated,
                    self.use_bias,
                    self.activation_dropout,
                    **shared,
                ),
                norm=norm,
                norms="before" if self.norm_first else "sum",
                dropout=self.dropout,
            ),
            norm=norm if self.norm_first else None,
            relative_bias=functools.partial(
                RelativeBias, self.num_heads, self.relative_buckets, self.relative_max_distance
            )
            if relative
            else None,
            dropout=self.dropout,
            unroll=self.unroll,
            remat=self.remat,
        )
        self.word = layers.Embedding(self.vocab_size, self.hidden_size, dtype, table_init)
        self.scale = scale
        if self.positions == "learned":
            position_init = nn.initializers.normal(1.0 if self.initializer_range is None else self.initializer_range)
            table = functools.partial(layers.Embedding, self.max_positions, self.hidden_size, dtype, position_init)
            self.position = {side: table() for side in SIDES}
        if self.embedding_norm:
            self.norm_in = {side: norm() for side in SIDES}
        self.encoder = stack(self.num_layers, causal=False)
        self.decoder = stack(self.num_decoder_layers or self.num_layers, causal=True)
        if not self.tie_embeddings:
            self.head = layers.Dense(self.vocab_size, False, dtype, kernel_init)
        if self.logits_bias:
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
        self.cache_index = CacheIndex()

    def __call__(
        self,
        input_ids_BxS: jax.Array,
        decoder_input_ids_BxT: jax.Array,
        attention_mask_BxS: jax.Array | None = None,
        decoder_attention_mask_BxT: jax.Array | None = None,
        positions_BxS: jax.Array | None = None,
        decoder_positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, S] and [B, T] to logits float32 [B, T, V]; see `encode` and `decode`."""
        hidden_BxTxD = self.hidden(
            input_ids_BxS,
            decoder_input_ids_BxT,
            attention_mask_BxS,
            decoder_attention_mask_BxT,
            positions_BxS,
            decoder_positions_BxT,
        )
        return self.logits(hidden_BxTxD).astype(jnp.float32)

    def encode(
        self,
        input_ids_BxS: jax.Array,
        attention_mask_BxS: jax.Array | None = None,
        positions_BxS: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, S] to [B, S, D]; see `structure.Structure` for the numbers in the mask."""
        x_BxSxD = self._embed("encoder", input_ids_BxS, attention_mask_BxS, positions_BxS, 0)
        return self.encoder(x_BxSxD, attention_mask_BxS, packed=positions_BxS is not None)

    def decode(
        self,
        decoder_input_ids_BxT: jax.Array,
        encoded_BxSxD: jax.Array,
        attention_mask_BxS: jax.Array | None = None,
        decoder_attention_mask_BxT: jax.Array | None = None,
        decoder_positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to the hidden states [B, T, D] that `logits` takes.

        Where `apply` lets the collection "cache" change, keys and values of both kinds of attention are kept in it, as
        in `gpt.Decoder.hidden`: the length of `decoder_attention_mask_BxT` is then the size of the cache.

        Args:
          decoder_input_ids_BxT: tokens, the first of which is the start token.
          encoded_BxSxD: what `encode` returned.
          attention_mask_BxS: of the encoder. Tokens attend to what has their own number in it.
          decoder_attention_mask_BxT: alike of the decoder; 1 everywhere where it is None.
          decoder_positions_BxT: positions; tokens are counted, but for padding, where they are None.
        """
        length = decoder_input_ids_BxT.shape[1]
        index = self.cache_index(length)
        start = 0 if index is None else index
        x_BxTxD = self._embed(
            "decoder", decoder_input_ids_BxT, decoder_attention_mask_BxT, decoder_positions_BxT, start
        )
        source, packed = EVERYTHING, decoder_positions_BxT is not None
        if attention_mask_BxS is not None:
            numbers_BxT = jnp.ones(decoder_input_ids_BxT.shape, attention_mask_BxS.dtype)
            if decoder_attention_mask_BxT is not None:
                numbers_BxT = jax.lax.dynamic_slice_in_dim(decoder_attention_mask_BxT, start, length, 1)
            source = Structure(numbers_BxT, attention_mask_BxS, packed=packed)
        return self.decoder(
            x_BxTxD,
            decoder_attention_mask_BxT,
            source_BxSxD=encoded_BxSxD,
            source_structure=source,
            index=index,
            packed=packed,
        )

    def hidden(
        self,
        input_ids_BxS: jax.Array,
        decoder_input_ids_BxT: jax.Array,
        attention_mask_BxS: jax.Array | None = None,
        decoder_attention_mask_BxT: jax.Array | None = None,
        positions_BxS: jax.Array | None = None,
        decoder_positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map what `__call__` takes to the hidden states [B, T, D] that `logits` takes."""
        encoded_BxSxD = self.encode(input_ids_BxS, attention_mask_BxS, positions_BxS)
        return self.decode(
            decoder_input_ids_BxT, encoded_BxSxD, attention_mask_BxS, decoder_attention_mask_BxT, decoder_positions_BxT
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states [..., D] to logits [..., V], in `dtype` as they were computed, or float32 with a bias."""
        hidden *= jnp.asarray(self.logits_scale, hidden.dtype)
        logits = self.word.attend(hidden) if self.tie_embeddings else self.head(hidden)
        return logits.astype(jnp.float32) + self.head_bias if self.logits_bias else logits

    def _embed(
        self,
        side: str,
        input_ids_BxT: jax.Array,
        numbers_BxS: jax.Array | None,
        positions_BxT: jax.Array | None,
        start: jax.Array | int,
    ) -> jax.Array:
        x_BxTxD = self.word(input_ids_BxT) * jnp.asarray(self.scale, self.dtype)
        if self.positions != "relative":
            if positions_BxT is None:
                positions_BxT = positions(numbers_BxS, input_ids_BxT.shape, start)
            if self.positions == "learned":
                x_BxTxD += self.position[side](positions_BxT)
            else:
                x_BxTxD += sinusoids(positions_BxT, self.hidden_size).astype(self.dtype)
        return self.norm_in[side](x_BxTxD) if self.embedding_norm else x_BxTxD
