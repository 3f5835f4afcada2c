"""Attention, and the ways to compute it.

Shape letters as in `layers`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError, nearest
from research.models import kernels
from research.models.layers import Dense, Dropout, Initializer, drop, product, soft_cap
from research.models.positions import by_distance, rotate
from research.models.structure import EVERYTHING, Structure
from research.sharding import constrain, platform

# Scores of a head that exist at once in `chunked`, at most, and the keys from which "auto" prefers it to "xla". On two
# CPU cores they took 0.66 and 0.75 s for 2,048 causal tokens, 3.4 and 2.6 s for 4,096, in 131 and 784, 88 and 1,552 MB.
BLOCK, LONG = 2**19, 2048


class DropWeights(NamedTuple):
    """Dropout of attention weights: the share that is dropped, and the key that decides which."""

    rate: float
    key: jax.Array


def attend(
    query_BxTxHxK: jax.Array,
    key_BxSxGxK: jax.Array,
    value_BxSxGxK: jax.Array,
    structure: Structure = EVERYTHING,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: DropWeights | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Return what queries find, [B, T, H, K] in their dtype; see `xla` for the function that is computed.

    Args:
      query_BxTxHxK: queries; H is a multiple of G, and head h attends to the keys and values of group h // (H / G).
      key_BxSxGxK: keys.
      value_BxSxGxK: values.
      structure: what may attend to what. What a query finds that may attend to nothing is arbitrary.
      bias: added to the scaled and capped scores by distance, [H, T + S - 1]: that of query i and key j stands at
        j - i + T - 1.
      scale: what scores are multiplied by; K ** -0.5 where it is None.
      softcap: what scaled scores are kept below, by tanh (Gemma Team 2024, section 2); None leaves them.
      dropout: of the weights; None for none.
      implementation: "xla"; "chunked": the same for a few queries at a time, so that memory grows with the length and
        not with its square; "cudnn" and "flash", on GPUs, and "splash", on TPUs: kernels; "auto" chooses.

    Raises:
      UserError: the implementation cannot compute this; the message says why.
    """
    scale = query_BxTxHxK.shape[-1] ** -0.5 if scale is None else scale
    operands = query_BxTxHxK, key_BxSxGxK, value_BxSxGxK
    if implementation == "auto":
        implementation = choose(operands, structure, bias, dropout, softcap)
    elif implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention: unknown implementation '{implementation}'{nearest(implementation, NAMES)}")
    elif (why := obstacle(implementation, operands, structure, bias, dropout, softcap)) is not None:
        raise UserError(f"attention: '{implementation}' {why}; 'auto' chooses one that can")

    def compute(structure: Structure, *operands: jax.Array) -> jax.Array:
        return IMPLEMENTATIONS[implementation](*operands, structure, bias, scale, dropout, softcap)

    if structure.local is None or implementation in PLAIN:
        return compute(structure, *operands)
    # A kernel is compiled for one window.
    near, far = (dataclasses.replace(structure, local=None, window=window) for window in (structure.window, None))
    branches = functools.partial(compute, near), functools.partial(compute, far)
    return jax.lax.cond(jnp.asarray(structure.local), *branches, *operands)


Operands = tuple[jax.Array, jax.Array, jax.Array]


def choose(
    operands: Operands,
    structure: Structure,
    bias: jax.Array | None,
    dropout: DropWeights | None,
    softcap: float | None = None,
) -> str:
    """Return the implementation that is best on the platform: its kernel where that serves and pays."""
    kernels_ = KERNELS.get(platform(), ())
    for kernel in kernels_ if bias is None else reversed(kernels_):  # cuDNN needs a bias written out
        if obstacle(kernel, operands, structure, bias, dropout, softcap) is None:
            return kernel
    query, key, _ = operands
    return "chunked" if query.shape[1] >= BLOCK // key.shape[1] and key.shape[1] >= LONG else "xla"


def obstacle(
    implementation: str,
    operands: Operands,
    structure: Structure,
    bias: jax.Array | None,
    dropout: DropWeights | None,
    softcap: float | None = None,
) -> str | None:
    """Return why an implementation cannot compute this, or None."""
    if implementation in PLAIN:
        return None
    if softcap is not None and implementation != "splash":
        return "has no soft cap of scores"
    if dropout is not None and implementation != "flash":
        return "has no dropout of attention weights"
    if structure.start is not None:
        return "has no cache of keys and values"
    asked = {"cudnn": kernels.cudnn_obstacle, "flash": kernels.flash_obstacle, "splash": kernels.splash_obstacle}
    return asked[implementation](*operands, structure, bias, platform())


def xla(
    query_BxTxHxK: jax.Array,
    key_BxSxGxK: jax.Array,
    value_BxSxGxK: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    drop_weights: Callable[[jax.Array], jax.Array] | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani 2017, section 3.2.1), with grouped heads (Ainslie 2023).

    Returns:
      outputs [B, T, H, K] in the queries' dtype and the weights [B, H, T, S] in float32, before dropout.
    """
    if scale is None:
        scale = query_BxTxHxK.shape[-1] ** -0.5
    scores_BxHxTxS = _grouped("BTHK,BSHK->BHTS", query_BxTxHxK * scale, key_BxSxGxK, product)
    if softcap is not None:
        scores_BxHxTxS = soft_cap(scores_BxHxTxS, softcap)
    if bias is not None:
        scores_BxHxTxS += bias
    if mask is not None:
        # The lowest finite number, not -inf: a row that may attend to nothing stays finite.
        scores_BxHxTxS = jnp.where(mask, scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    dropped_BxHxTxS = drop_weights(weights_BxHxTxS) if drop_weights else weights_BxHxTxS
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


def _whole(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    structure: Structure,
    bias: jax.Array | None,
    scale: float,
    dropout: DropWeights | None,
    softcap: float | None,
) -> jax.Array:
    mask = structure.mask(query.shape[1], key.shape[1])
    bias = None if bias is None else by_distance(bias, query.shape[1])
    return xla(query, key, value, mask, bias, scale, _dropped(dropout, query.shape[1], 0), softcap)[0]


def chunked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    structure: Structure,
    bias: jax.Array | None,
    scale: float,
    dropout: DropWeights | None,
    softcap: float | None = None,
) -> jax.Array:
    """Compute `xla` for a block of queries at a time, in the backward pass again (Rabe 2021, section 2)."""
    length, size = query.shape[1], key.shape[1]
    block = max(min(BLOCK // size, length), 1)
    count = -(-length // block)
    # In float32 so that the blocks' gradients are added in it.
    key_32, value_32 = key.astype(jnp.float32), value.astype(jnp.float32)
    first = jnp.zeros((), jnp.int32) if structure.start is None else structure.start
    filled = None if bias is None else jnp.pad(bias, [(0, 0), (count * block - length, 0)])

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, count * block - length if i == axis else 0) for i in range(x.ndim)]
        split = jnp.pad(x, widths).reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    @jax.checkpoint
    def one(part: tuple) -> jax.Array:
        index, queries, numbers = part
        rows = dataclasses.replace(structure, queries_BxT=numbers, start=first + index * block)
        keys, values = key_32.astype(key.dtype), value_32.astype(value.dtype)
        mask, drop_weights = rows.mask(block, size), _dropped(dropout, length, index * block)
        biases = None
        if filled is not None:
            start = (count - 1 - index) * block
            biases = by_distance(jax.lax.dynamic_slice_in_dim(filled, start, block + size - 1, axis=1), block)
        return xla(queries, keys, values, mask, biases, scale, drop_weights, softcap)[0]

    numbers = None if structure.queries_BxT is None else blocks(structure.queries_BxT, 1)
    outputs = jax.lax.map(one, (jnp.arange(count), blocks(query, 1), numbers))
    return jnp.moveaxis(outputs, 0, 1).reshape(query.shape[0], count * block, *query.shape[2:])[:, :length]


def _dropped(dropout: DropWeights | None, length: int, start: jax.Array | int) -> Callable | None:
    """Return the dropout of the weights of queries from `start` on, the same as if all `length` were there."""
    if dropout is None:
        return None

    def apply(weights_BxHxTxS: jax.Array) -> jax.Array:
        batch, heads, queries, size = (
            jax.lax.broadcasted_iota(jnp.uint32, weights_BxHxTxS.shape, axis) for axis in range(4)
        )
        rows = (batch * weights_BxHxTxS.shape[1] + heads) * jnp.uint32(length) + queries + jnp.uint32(start)
        return drop(weights_BxHxTxS, dropout.key, dropout.rate, rows * jnp.uint32(weights_BxHxTxS.shape[3]) + size)

    return apply


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _whole,
    "chunked": chunked,
    "cudnn": kernels.cudnn,
    "flash": kernels.flash,
    "splash": kernels.splash,
}
NAMES = ("auto", *IMPLEMENTATIONS)
PLAIN = ("xla", "chunked")  # which compute everything
# Best first. On an H200, 32 rows of 1,024 causal tokens in 12 heads of 64 took cuDNN 0.83 ms both ways, and
# 1.25 ms with a mask of documents; `flash`, which skips blocks between documents, took 0.58 ms.
KERNELS = {"gpu": ("cudnn", "flash"), "tpu": ("splash",)}


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
      norm_whole: whether that norm goes over all heads at once (OLMo Team 2024), and not over each.
      scale: see `attend`.
      softcap: see `attend`.
      dropout: on the attention weights.
      dtype: of the products.
      kernel_init: of the kernels.
      query_init: of the queries' kernel, where it is another one.
      out_init: of the last kernel, where it is another one.
      implementation: see `attend`.
      remat: "attention" keeps nothing between the queries, keys, values and the result for the backward pass, which
        computes it again (Korthikanti 2022, section 5); other policies are the stack's, see `blocks.REMAT`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_width: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    query_key_norm: Callable[..., nn.Module] | None = None
    norm_whole: bool = False
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    query_init: Initializer | None = None
    out_init: Initializer | None = None
    implementation: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        structure: Structure = EVERYTHING,
        *,
        bias: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        position_BxTxD: jax.Array | None = None,
        source_BxSxD: jax.Array | None = None,
        source_position_BxSxD: jax.Array | None = None,
        index: jax.Array | None = None,
    ) -> jax.Array:
        """Map [B, T, D] to [B, T, D].

        Where `apply` lets "intermediates" change, the weights [B, H, T, S] are sown in it, and computed by `xla`.

        Args:
          x_BxTxD: what asks, and is attended to unless there is a `source_BxSxD`.
          structure: see `attend`.
          bias: see `attend`.
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
            if self.query_key_norm:
                wide = x.reshape(*x.shape[:-2], -1) if self.norm_whole else x
                x = self.query_key_norm(name=f"{name}_norm")(wide).reshape(x.shape)
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
            size = length if structure.keys_BxS is None else structure.keys_BxS.shape[1]
            key, value = self._appended(*keys_and_values(), index, size)
        outputs_BxTxHxK = self._attend(query_BxTxHxK, key, value, structure, bias)
        out = Dense(width, self.out_bias, self.dtype, self.out_init or self.kernel_init, name="out")
        return out(outputs_BxTxHxK.reshape(batch, length, heads * head_width))

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, structure: Structure, bias: jax.Array | None
    ) -> jax.Array:
        rng = Dropout(self.dropout, name="dropout").key()
        dropout = None if rng is None else DropWeights(self.dropout, rng)
        if not self.is_mutable_collection("intermediates"):
            query, key, value = (constrain(x, "batch", "length", "heads") for x in (query, key, value))
            call = functools.partial(
                attend,
                structure=structure,
                bias=bias,
                scale=self.scale,
                softcap=self.softcap,
                dropout=dropout,
                implementation=self.implementation,
            )
            return (jax.checkpoint(call) if self.remat == "attention" else call)(query, key, value)
        mask, drop_weights = structure.mask(query.shape[1], key.shape[1]), _dropped(dropout, query.shape[1], 0)
        outputs, weights_BxHxTxS = xla(query, key, value, mask, bias, self.scale, drop_weights, self.softcap)
        self.sow("intermediates", "weights", weights_BxHxTxS)
        return outputs

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
