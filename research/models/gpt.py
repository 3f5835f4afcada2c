"""Decoders: GPT-2 (Radford 2019), GPT-3 (Brown 2020), Llama (Touvron 2023), Gemma 3 (Gemma Team 2025) and their kin.

They differ in their positions, norms, biases, feed-forward networks and groups of heads, each of which is a field.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.models import layers
from research.models.attention import Attention, CacheIndex
from research.models.blocks import Block, stack
from research.models.positions import longest, positions, rotary_angles
from research.models.structure import Structure

POSITIONS = ("learned", "rotary")


class Decoder(nn.Module):
    """A causal language model; its defaults are GPT-2 small's.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      num_layers: blocks.
      num_heads: H.
      num_kv_heads: groups of heads that share keys and values (Ainslie 2023); H where it is None.
      head_width: K; D / H where it is None.
      intermediate_size: F.
      max_positions: the longest sequence that there are learned positions for.
      positions: "learned" or "rotary".
      rope_theta: base of the rotary wavelengths.
      rope_scaling: see `positions.rotary_angles`.
      rope_local_theta: that base in the layers that keep to the window, which do not stretch wavelengths then; None
        leaves them as the others.
      rope_share: the share of a head's dimensions that are rotated, the first ones.
      norm: "layer" or "rms".
      norms: what is normalised in a block: see `blocks.NORMS`. There is a norm at the end too.
      norm_epsilon: of every norm.
      activation: of the MLP, by its Hugging Face name.
      gated: whether the MLP has a gate.
      attention_bias: of the projections to queries, keys and values.
      out_bias: of the projection of the attention's result.
      mlp_bias: of the MLP.
      query_key_norm: whether each head's queries and keys are normalised.
      query_key_norm_whole: whether that goes over all heads at once.
      query_scale: what scores are divided by the square root of; K where it is None.
      attention_softcap: what scores are kept below, by tanh; None leaves them.
      sliding_window: how many tokens back attention reaches, its own included; None for all.
      local_layers: which layers keep to that window; None for all.
      logits_softcap: what logits are kept below, by tanh; None leaves them.
      tie_embeddings: whether the output layer's weights are the word table.
      embedding_scale: what word embeddings are multiplied by.
      dropout: after the embeddings and before each residual sum.
      attention_dropout: on the attention weights.
      initializer_range: standard deviation of the initial kernels and tables; of those that end in a residual sum it
        is divided by sqrt(2 layers) (Radford 2019, section 2.3). Where it is None, that which keeps the variance of
        what goes through at 1: 1 of tables, 1 / sqrt(inputs) of kernels.
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_width: int | None = None
    intermediate_size: int = 3072
    max_positions: int = 1024
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_local_theta: float | None = None
    rope_share: float = 1.0
    norm: str = "layer"
    norms: str = "before"
    norm_epsilon: float = 1e-5
    activation: str = "gelu_new"
    gated: bool = False
    attention_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    query_key_norm: bool = False
    query_key_norm_whole: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    sliding_window: int | None = None
    local_layers: Sequence[bool] | None = None
    logits_softcap: float | None = None
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float | None = 0.02
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        """Make the embeddings, a block, the last norm and the output layer."""
        if self.positions not in POSITIONS:
            raise UserError(f"unknown positions '{self.positions}'{nearest(self.positions, POSITIONS)}")
        if self.local_layers is not None and (self.sliding_window is None or len(self.local_layers) != self.num_layers):
            raise UserError(
                f"local_layers needs a sliding_window and a value for each of {self.num_layers} layers; it has "
                f"{len(self.local_layers)}, and sliding_window is {self.sliding_window}"
            )
        dtype, residuals = jnp.dtype(self.dtype), 2 * self.num_layers
        if self.initializer_range is None:
            scaled = nn.initializers.variance_scaling
            kernel_init, out_init = (scaled(scale, "fan_in", "normal") for scale in (1.0, 1.0 / residuals))
            table_init = nn.initializers.normal(1.0 / self.embedding_scale)
        else:
            kernel_init = table_init = nn.initializers.normal(self.initializer_range)
            out_init = nn.initializers.normal(self.initializer_range / math.sqrt(residuals))
        norm = functools.partial(layers.norm(self.norm), self.norm_epsilon, dtype=dtype)
        table = functools.partial(layers.Embedding, features=self.hidden_size, dtype=dtype, embedding_init=table_init)
        shared: dict[str, Any] = {"dtype": dtype, "kernel_init": kernel_init, "out_init": out_init}
        self.word = table(self.vocab_size)
        if self.positions == "learned":
            self.position = table(self.max_positions)
        self.drop = layers.Dropout(self.dropout)
        self.layers = Block(
            attention=functools.partial(
                Attention,
                self.num_heads,
                self.num_kv_heads,
                self.head_width,
                self.attention_bias,
                self.out_bias,
                norm if self.query_key_norm else None,
                self.query_key_norm_whole,
                None if self.query_scale is None else self.query_scale**-0.5,
                self.attention_softcap,
                dropout=self.attention_dropout,
                implementation=self.attention,
                remat=self.remat,
                **shared,
            ),
            mlp=functools.partial(
                layers.MLP, self.intermediate_size, self.activation, self.gated, self.mlp_bias, **shared
            ),
            norm=norm,
            norms=self.norms,
            dropout=self.dropout,
        )
        self.norm_out = norm()
        if not self.tie_embeddings:
            self.head = layers.Dense(self.vocab_size, False, dtype, kernel_init)
        self.cache_index = CacheIndex()

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxS: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to logits float32 [B, T, V] of the tokens that follow; see `hidden`."""
        return self.logits(self.hidden(input_ids_BxT, attention_mask_BxS, positions_BxT)).astype(jnp.float32)

    def hidden(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxS: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Map token ids int32 [B, T] to the hidden states [B, T, D] that `logits` takes.

        Where `apply` lets the collection "cache" change, keys and values are kept in it: the first call makes a cache
        of S places and fills T of them, the next ones continue.

        Args:
          input_ids_BxT: tokens.
          attention_mask_BxS: 0 at padding, which may come first or last; tokens attend to earlier ones of their own
            number, see `structure.Structure`. S is T, or the size of the cache, where the places of tokens that are
            still to come hold 1 already.
          positions_BxT: positions; where they are None tokens are counted, but for padding, and a row must hold one
            document and its padding alone.
        """
        length = input_ids_BxT.shape[1]
        index = self.cache_index(length)
        structure = Structure.within(
            attention_mask_BxS,
            length,
            causal=True,
            index=index,
            window=self.sliding_window,
            packed=positions_BxT is not None,
        )
        most = longest(attention_mask_BxS, length, positions_BxT)
        if positions_BxT is None:
            positions_BxT = positions(attention_mask_BxS, input_ids_BxT.shape, 0 if index is None else index)
        x_BxTxD = self.word(input_ids_BxT) * jnp.asarray(self.embedding_scale, self.dtype)
        context: dict[str, Any] = {"structure": structure, "index": index}
        if self.positions == "learned":
            x_BxTxD += self.position(positions_BxT)
        else:
            width = int((self.head_width or self.hidden_size // self.num_heads) * self.rope_share)
            context["rotary"] = rotary_angles(positions_BxT, width, self.rope_theta, self.rope_scaling, most)
            if self.rope_local_theta is not None:
                context["local_rotary"] = rotary_angles(positions_BxT, width, self.rope_local_theta)
        local = self.local_layers
        if local is None and self.rope_local_theta is not None:
            local = self.num_layers * [self.sliding_window is not None]
        if local is not None:
            context["each"] = {"local": np.array(local, bool)}
        x_BxTxD = stack(
            self.layers, self.num_layers, self.drop(x_BxTxD), unroll=self.unroll, remat=self.remat, **context
        )
        return self.norm_out(x_BxTxD)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states [..., D] to logits [..., V], in `dtype` as they were computed, or float32 where capped."""
        logits = self.word.attend(hidden) if self.tie_embeddings else self.head(hidden)
        if self.logits_softcap is None:
            return logits
        return layers.soft_cap(logits.astype(jnp.float32), self.logits_softcap)
