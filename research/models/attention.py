"""Attention and its masks.

Shape letters as in `layers`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.models.layers import Dense, Dropout, Initializer, product
from research.models.positions import rotate


def attention(
    query_BxTxHxK: jax.Array,
    key_BxSxGxK: jax.Array,
    value_BxSxGxK: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani 2017, section 3.2.1), with grouped heads (Ainslie 2023).

    Args:
      query_BxTxHxK: queries; H is a multiple of G, and head h attends to the keys and values of group h // (H / G).
      key_BxSxGxK: keys.
      value_BxSxGxK: values.
      mask: bool, broadcastable to [B, H, T, S]; False where attention is forbidden.
      bias: added to the scaled scores, broadcastable to [B, H, T, S].
      scale: what scores are multiplied by; K ** -0.5 where it is None.
      drop: dropout for the attention weights.

    Returns:
      outputs [B, T, H, K] in the queries' dtype and the weights [B, H, T, S] in float32, before dropout.
    """
    if scale is None:
        scale = query_BxTxHxK.shape[-1] ** -0.5
    scores_BxHxTxS = _grouped("BTHK,BSHK->BHTS", query_BxTxHxK * scale, key_BxSxGxK, product)
    if bias is not None:
        scores_BxHxTxS += bias
    if mask is not None:
        # The lowest finite number, not -inf: a row that may attend to nothing stays finite.
        scores_BxHxTxS = jnp.where(mask, scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    dropped_BxHxTxS = drop(weights_BxHxTxS) if drop else weights_BxHxTxS
    outputs_BxTxHxK = _grouped("BHTS,BSHK->BTHK", dropped_BxHxTxS.astype(value_BxSxGxK.dtype), value_BxSxGxK)
    return outputs_BxTxHxK, weights_BxHxTxS


def _grouped(
    subscripts: str, many: jax.Array, few: jax.Array, contract: Callable[..., jax.Array] = jnp.einsum
) -> jax.Array:
    """Contract an operand of H heads with one [B, S, G, K] of G groups of heads, without repeating the latter."""
    axis = subscripts.index("H")
    heads, groups = many.shape[axis], few.shape[2]
    if heads == groups:
        return contract(subscripts, many, few)
    split = many.reshape(*many.shape[:axis], groups, heads // groups, *many.shape[axis + 1 :])
    first, rest = subscripts.split(",")
    second, result = rest.split("->")
    subscripts = f"{first.replace('H', 'GR')},{second.replace('H', 'G')}->{result.replace('H', 'GR')}"
    output = contract(subscripts, split, few)
    axis = result.index("H")
    return output.reshape(*output.shape[:axis], heads, *output.shape[axis + 2 :])


def attention_mask(
    numbers_BxS: jax.Array | None,
    length: int,
    *,
    causal: bool,
    index: jax.Array | int = 0,
    window: int | None = None,
) -> jax.Array | None:
    """Return which keys each query may attend to, bool broadcastable to [B, 1, T, S], or None where all may to all.

    Args:
      numbers_BxS: 0 at padding; queries attend to keys of their own number only, so that documents that are packed into
        one row, numbered 1, 2, ..., stay apart.
      length: T.
      causal: whether queries attend to no later key.
      index: where the first query stands among the keys.
      window: queries attend to the last `window` keys only, their own included; None for all.
    """
    keys = length if numbers_BxS is None else numbers_BxS.shape[1]
    queries_Tx1, keys_1xS = index + jnp.arange(length)[:, None], jnp.arange(keys)[None]
    mask = None
    if causal:
        mask = (keys_1xS <= queries_Tx1)[None, None]
    if window is not None:
        mask = (keys_1xS > queries_Tx1 - window)[None, None] & (True if mask is None else mask)
    if numbers_BxS is None:
        return mask
    return between(jax.lax.dynamic_slice_in_dim(numbers_BxS, index, length, 1), numbers_BxS) & (
        True if mask is None else mask
    )


def between(queries_BxT: jax.Array, keys_BxS: jax.Array) -> jax.Array:
    """Return where a query and a key are of the same document and the key is no padding, bool [B, 1, T, S]."""
    same_BxTxS = queries_BxT[:, :, None] == keys_BxS[:, None, :]
    return (same_BxTxS & (keys_BxS != 0)[:, None, :])[:, None]


class CacheIndex(nn.Module):
    """How many keys and values the cache of a decoder holds, where a caller of `apply` lets "cache" change."""

    @nn.compact
    def __call__(self, length: int) -> jax.Array | None:
        """Return the number before `length` more are written; None where there is no cache."""
        if not self.is_mutable_collection("cache"):
            return None
        held = self.variable("cache", "index", lambda: jnp.zeros((), jnp.int32))
        index = held.value
        held.value += length
        return index


class Attention(nn.Module):
    """Multi-head attention with its projections, to its own sequence or to another one.

    Attributes:
      num_heads: H.
      num_kv_heads: G, a divisor of H; H where it is None.
      head_width: K; D / H where it is None.
      use_bias: of the projections to queries, keys and values.
      out_bias: of the projection of the result.
      query_key_norm: makes the norm of each head's queries and keys (Henry 2020); None leaves them.
      scale: see `attention`.
      dropout: on the attention weights.
      dtype: of the products.
      kernel_init: of the kernels.
      query_init: of the queries' kernel, where it is another one.
      out_init: of the last kernel, where it is another one.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_width: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    query_key_norm: Callable[..., nn.Module] | None = None
    scale: float | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    query_init: Initializer | None = None
    out_init: Initializer | None = None

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask: jax.Array | None = None,
        *,
        bias: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        position_BxTxD: jax.Array | None = None,
        source_BxSxD: jax.Array | None = None,
        source_position_BxSxD: jax.Array | None = None,
        index: jax.Array | None = None,
    ) -> jax.Array:
        """Map [B, T, D] to [B, T, D]; sows the weights [B, H, T, S] as intermediates.

        Args:
          x_BxTxD: what asks, and is attended to unless there is a `source_BxSxD`.
          mask: see `attention`.
          bias: see `attention`.
          rotary: sine and cosine, see `rotary_angles`.
          position_BxTxD: added to what queries and keys are made from, and not to what values are (Carion 2020).
          source_BxSxD: what is attended to instead (cross-attention).
          source_position_BxSxD: added to what keys are made from where there is a source.
          index: where in the cache the new keys and values go; None computes without one.
        """
        batch, length, width = x_BxTxD.shape
        heads, groups = self.num_heads, self.num_kv_heads or self.num_heads
        if self.head_width is None and width % heads:
            raise UserError(f"hidden_size {width} is not a multiple of num_heads {heads}")
        if heads % groups:
            raise UserError(f"num_heads {heads} is not a multiple of num_kv_heads {groups}")
        head_width = self.head_width or width // heads

        def project(name: str, x: jax.Array, count: int, init: Initializer | None = None) -> jax.Array:
            dense = Dense(count * head_width, self.use_bias, self.dtype, init or self.kernel_init, name=name)
            return dense(x).reshape(*x.shape[:-1], count, head_width)

        def placed(x: jax.Array, position: jax.Array | None) -> jax.Array:
            return x if position is None else x + position.astype(x.dtype)

        def turn(x: jax.Array, name: str) -> jax.Array:
            x = self.query_key_norm(name=f"{name}_norm")(x) if self.query_key_norm else x
            return rotate(x, *rotary) if rotary else x

        def keys_and_values() -> tuple[jax.Array, jax.Array]:
            source, position = x_BxTxD, position_BxTxD
            if source_BxSxD is not None:
                source, position = source_BxSxD, source_position_BxSxD
            key = turn(project("key", placed(source, position), groups), "key")
            return key, project("value", source, groups)

        query_BxTxHxK = turn(project("query", placed(x_BxTxD, position_BxTxD), heads, self.query_init), "query")
        if index is None:
            key, value = keys_and_values()
        elif source_BxSxD is not None:
            key, value = self._kept(keys_and_values)
        else:
            key, value = self._appended(*keys_and_values(), index, length if mask is None else mask.shape[-1])
        drop = Dropout(self.dropout, name="dropout")
        outputs_BxTxHxK, weights_BxHxTxS = attention(query_BxTxHxK, key, value, mask, bias, self.scale, drop)
        self.sow("intermediates", "weights", weights_BxHxTxS)
        out = Dense(width, self.out_bias, self.dtype, self.out_init or self.kernel_init, name="out")
        return out(outputs_BxTxHxK.reshape(batch, length, heads * head_width))

    def _kept(self, make: Callable[[], tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of another sequence, which are computed the first time only."""
        if not self.has_variable("cache", "keys"):
            keys, values = make()
            self.variable("cache", "keys", lambda: keys)
            self.variable("cache", "values", lambda: values)
        return self.get_variable("cache", "keys"), self.get_variable("cache", "values")

    def _appended(
        self, key_BxTxGxK: jax.Array, value_BxTxGxK: jax.Array, index: jax.Array, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Write keys and values into the cache, which has room for `size`, and return all of it, [B, S, G, K]."""

        def append(name: str, new: jax.Array) -> jax.Array:
            shape = (new.shape[0], size, *new.shape[2:])
            held = self.variable("cache", name, lambda: jnp.zeros(shape, new.dtype))
            held.value = jax.lax.dynamic_update_slice_in_dim(held.value, new, index, axis=1)
            return held.value

        return append("keys", key_BxTxGxK), append("values", value_BxTxGxK)
