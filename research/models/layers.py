"""The transformer core that every model shares.

Shape letters: B batch, T query positions, S key positions, D model width, H heads, G groups of heads that share keys
and values, K width of a head, F feed-forward.
Parameters are float32; `dtype` is what matrix products are computed in; softmax and norms are computed in float32.
Dropout acts where `apply` is given a "dropout" key and is the identity otherwise: only training passes one.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError, nearest

Initializer = Callable[..., jax.Array]


def _gelu(x: jax.Array) -> jax.Array:
    """The exact GELU (Hendrycks 2016); by erf, which costs a CPU less than `jax.nn.gelu`'s erfc."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * jnp.asarray(0.5**0.5, x.dtype)))


# The names are those of Hugging Face's config.json.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the elementwise function of that name, or raises UserError."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation '{name}'{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


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
    groups = key_BxSxGxK.shape[2]
    if scale is None:
        scale = query_BxTxHxK.shape[-1] ** -0.5
    scores_BxHxTxS = _grouped("BTHK,BSHK->BHTS", query_BxTxHxK * scale, key_BxSxGxK, groups, jnp.float32)
    if bias is not None:
        scores_BxHxTxS += bias
    if mask is not None:
        # The lowest finite number, not -inf: a row that may attend to nothing stays finite.
        scores_BxHxTxS = jnp.where(mask, scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    dropped_BxHxTxS = drop(weights_BxHxTxS) if drop else weights_BxHxTxS
    outputs_BxTxHxK = _grouped("BHTS,BSHK->BTHK", dropped_BxHxTxS.astype(value_BxSxGxK.dtype), value_BxSxGxK, groups)
    return outputs_BxTxHxK, weights_BxHxTxS


def _grouped(subscripts: str, many: jax.Array, few: jax.Array, groups: int, dtype: Any = None) -> jax.Array:
    """Contracts an operand of H heads with one of G groups of heads, without repeating the latter."""
    axis = subscripts.index("H")
    heads = many.shape[axis]
    if heads == groups:
        return jnp.einsum(subscripts, many, few, preferred_element_type=dtype)
    split = many.reshape(*many.shape[:axis], groups, heads // groups, *many.shape[axis + 1 :])
    first, rest = subscripts.split(",")
    second, result = rest.split("->")
    subscripts = f"{first.replace('H', 'GR')},{second.replace('H', 'G')}->{result.replace('H', 'GR')}"
    output = jnp.einsum(subscripts, split, few, preferred_element_type=dtype)
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
    """Returns which keys each query may attend to, bool broadcastable to [B, 1, T, S], or None where all may to all.

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
    """Returns where a query and a key are of the same document and the key is no padding, bool [B, 1, T, S]."""
    same_BxTxS = queries_BxT[:, :, None] == keys_BxS[:, None, :]
    return (same_BxTxS & (keys_BxS != 0)[:, None, :])[:, None]


def positions(numbers_BxS: jax.Array | None, shape: tuple[int, ...], index: jax.Array | int = 0) -> jax.Array:
    """Returns the positions, int32 [B, T], of the tokens from `index` on: rows count what is no padding, from 0."""
    if numbers_BxS is None:
        return jnp.broadcast_to(index + jnp.arange(shape[1]), shape)
    counts_BxS = jnp.maximum(jnp.cumsum((numbers_BxS != 0).astype(jnp.int32), axis=1) - 1, 0)
    return jax.lax.dynamic_slice_in_dim(counts_BxS, index, shape[1], 1)


def rotary_angles(
    positions_BxT: jax.Array, width: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns sine and cosine, float32 [B, T, 1, K/2], of rotary position embeddings (Su 2021, section 3.4).

    Args:
      positions_BxT: positions.
      width: K, even.
      theta: the base of the geometric series of wavelengths.
      scaling: how wavelengths are stretched, as config.json has it: None, {"rope_type": "linear", "factor": ...} (Chen
        2023) or {"rope_type": "llama3", ...} (Grattafiori 2024, section 3.2).
    """
    if width % 2:
        raise UserError(f"rotary positions need heads of an even width, not {width}")
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    scaling = scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        frequencies /= scaling["factor"]
    elif kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, scaling)
    elif kind != "default":
        raise UserError(f"unknown rope_type '{kind}'{nearest(kind, ('default', 'linear', 'llama3'))}")
    angles = positions_BxT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def _llama3_frequencies(frequencies: jax.Array, scaling: Mapping[str, Any]) -> jax.Array:
    """Leaves short wavelengths, stretches long ones by the factor, and goes smoothly from one to the other."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling["factor"]


def rotate(x_BxTxHxK: jax.Array, sine: jax.Array, cosine: jax.Array) -> jax.Array:
    """Turns the plane of each dimension of the first half and its fellow of the second half by its angle."""
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


def sinusoids(positions_BxT: jax.Array, width: int) -> jax.Array:
    """Returns the position embeddings of Vaswani 2017 (section 3.5), float32 [B, T, D]: all sines, then all cosines."""
    frequencies = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions_BxT[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


class Dropout(nn.Module):
    """Dropout (Srivastava 2014) that acts where a "dropout" key is given."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x with a share `rate` of its values zeroed and the rest scaled up."""
        if not 0 <= self.rate < 1:
            raise UserError(f"a dropout rate must lie in [0, 1); one is {self.rate}")
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        keep = _random_bits(self.make_rng("dropout"), x.shape) >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x * (1.0 / (1.0 - self.rate)), jnp.zeros_like(x))


class DropPath(nn.Module):
    """Stochastic depth (Huang 2016): drops all that a block adds to some examples, where a "dropout" key is given."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, depth: jax.Array) -> jax.Array:
        """Returns x [B, ...] with a share `rate * depth` of the examples zeroed and the rest scaled up."""
        if not 0 <= self.rate < 1:
            raise UserError(f"a drop_path rate must lie in [0, 1); one is {self.rate}")
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        kept = 1.0 - self.rate * depth
        factors_B = (jax.random.uniform(self.make_rng("dropout"), x.shape[:1]) < kept) / kept
        return x * factors_B.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def _random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 bits, a hash of the key and the position, by the rounds of lowbias32 (Wellons 2018).

    Threefry would do, but took a CPU three seconds longer to compile and a tenth of a step longer to run; a mask needs
    no more than bits that are even and unrelated between positions and keys.
    """
    first, second = jax.random.key_data(key).reshape(-1)[:2].astype(jnp.uint32)
    bits, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        bits += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bits ^= first
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) + second
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


class Dense(nn.Module):
    """A linear layer on the last axis; the others are flattened, as 2-D products run faster on CPUs."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., features], in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class Embedding(nn.Module):
    """A table [vocabulary, features] indexed by integers; an id beyond the table yields NaN, never a wrong row."""

    vocab_size: int
    features: int
    dtype: Any = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(0.02)

    def setup(self):
        """Makes the table."""
        self.embedding = self.param("embedding", self.embedding_init, (self.vocab_size, self.features), jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps integers [...] to [..., features]."""
        return jnp.take(self.embedding, ids, axis=0, mode="fill").astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Maps [..., features] to the products with every row, [..., vocabulary] in float32: an output layer's weights.

        The dtype of the product is that of the table, accumulated in float32.
        """
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        scores = jnp.einsum("nd,vd->nv", flat, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32)
        return scores.reshape(*x.shape[:-1], self.vocab_size)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba 2016) over the last axis, computed in float32."""

    epsilon: float = 1e-12
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D], in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang 2019) over the last axis, computed in float32."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D], in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon) * scale).astype(self.dtype)


NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}


def norm(name: str) -> type[nn.Module]:
    """Returns the normalisation of that name, or raises UserError."""
    if name not in NORMS:
        raise UserError(f"unknown norm '{name}'{nearest(name, NORMS)}")
    return NORMS[name]


class RelativeBias(nn.Module):
    """The learned bias of T5 by bucketed distance (Raffel 2019, section 2.1): half of the buckets are exact distances,
    the rest grow logarithmically up to `max_distance`.

    Attributes:
      num_heads: H.
      num_buckets: how many.
      max_distance: from here on all distances share the last bucket.
      bidirectional: whether keys after the query have buckets of their own, half of them all.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    embedding_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, length: int, keys: int, index: jax.Array | int = 0) -> jax.Array:
        """Returns [1, H, T, S] for T queries, the first of which stands at `index` of S keys."""
        table = self.param("embedding", self.embedding_init, (self.num_buckets, self.num_heads), jnp.float32)
        distances_TxS = jnp.arange(keys)[None] - (index + jnp.arange(length))[:, None]
        return table[self._buckets(distances_TxS)].transpose(2, 0, 1)[None]

    def _buckets(self, distances: jax.Array) -> jax.Array:
        buckets, base = self.num_buckets, jnp.zeros_like(distances)
        if self.bidirectional:
            buckets //= 2
            base, distances = jnp.where(distances > 0, buckets, 0), jnp.abs(distances)
        else:
            distances = jnp.maximum(-distances, 0)
        return base + jnp.asarray(self._table(buckets))[jnp.minimum(distances, self.max_distance)]

    def _table(self, buckets: int) -> list[int]:
        """Returns the bucket of every distance up to the greatest.

        Some lie on the edge of a bucket, so that precision and the order of the operations matter.
        """
        exact = buckets // 2
        if not 0 < exact < self.max_distance:
            raise UserError(
                f"{self.num_buckets} relative buckets do not fit a greatest distance of {self.max_distance}"
            )
        ratio = math.log(self.max_distance / exact)
        distances = range(exact, self.max_distance + 1)
        far = [exact + int(math.log(distance / exact) / ratio * (buckets - exact)) for distance in distances]
        return [*range(exact), *(min(bucket, buckets - 1) for bucket in far)]


class CacheIndex(nn.Module):
    """How many keys and values the cache of a decoder holds, where a caller of `apply` lets "cache" change."""

    @nn.compact
    def __call__(self, length: int) -> jax.Array | None:
        """Returns the number before `length` more are written; None where there is no cache."""
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
        """Maps [B, T, D] to [B, T, D]; sows the weights [B, H, T, S] as intermediates.

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
        """Returns keys and values of another sequence, which are computed the first time only."""
        if not self.has_variable("cache", "keys"):
            keys, values = make()
            self.variable("cache", "keys", lambda: keys)
            self.variable("cache", "values", lambda: values)
        return self.get_variable("cache", "keys"), self.get_variable("cache", "values")

    def _appended(
        self, key_BxTxGxK: jax.Array, value_BxTxGxK: jax.Array, index: jax.Array, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Writes keys and values into the cache, which has room for `size`, and returns all of it, [B, S, G, K]."""

        def append(name: str, new: jax.Array) -> jax.Array:
            shape = (new.shape[0], size, *new.shape[2:])
            held = self.variable("cache", name, lambda: jnp.zeros(shape, new.dtype))
            held.value = jax.lax.dynamic_update_slice_in_dim(held.value, new, index, axis=1)
            return held.value

        return append("keys", key_BxTxGxK), append("values", value_BxTxGxK)


class MLP(nn.Module):
    """The position-wise feed-forward network, plain or gated (Shazeer 2020).

    Attributes:
      hidden_size: F.
      activation: of the hidden layer, by its Hugging Face name; of the gate where there is one.
      gated: whether the hidden layer is multiplied by an activated gate instead of activated itself.
      use_bias: of all layers.
      dropout: on the hidden layer.
      dtype: of the products.
      kernel_init: of the kernels.
      out_init: of the last kernel, where it is another one.
    """

    hidden_size: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    out_init: Initializer | None = None

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D] through [B, T, F]."""
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)
        activate = activation(self.activation)
        h_BxTxF = dense(self.hidden_size, kernel_init=self.kernel_init, name="up")(x_BxTxD)
        if self.gated:
            h_BxTxF *= activate(dense(self.hidden_size, kernel_init=self.kernel_init, name="gate")(x_BxTxD))
        else:
            h_BxTxF = activate(h_BxTxF)
        h_BxTxF = Dropout(self.dropout, name="dropout")(h_BxTxF)
        return dense(x_BxTxD.shape[-1], kernel_init=self.out_init or self.kernel_init, name="down")(h_BxTxF)


class Block(nn.Module):
    """Attention, attention to a source where there is one, and MLP, each with a norm and a residual sum.

    Attributes:
      attention: makes an `Attention` of a name.
      mlp: makes an `MLP`.
      norm: makes a norm.
      norm_first: normalise what goes into each part (Xiong 2020), or each sum (Vaswani 2017; Devlin 2018).
      dropout: before each residual sum.
      layer_scale: what learned factors begin with that each part's output is multiplied by (Touvron 2021, "Going deeper
        with image transformers"); None leaves them out.
      drop_path: the share of examples that skip each part of the last block; it grows with depth from 0 (Huang 2016).
    """

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    norm_first: bool = True
    dropout: float = 0.0
    layer_scale: float | None = None
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        *,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        position_BxTxD: jax.Array | None = None,
        source_BxSxD: jax.Array | None = None,
        source_mask: jax.Array | None = None,
        source_position_BxSxD: jax.Array | None = None,
        index: jax.Array | None = None,
        depth: jax.Array | None = None,
    ) -> jax.Array:
        """Maps [B, T, D] to [B, T, D].

        `mask` to `index` are those of `Attention`; `depth` goes from 0 at the first block to 1 at the last.
        """

        def add(x: jax.Array, part: nn.Module, **context: Any) -> jax.Array:
            norm = self.norm(name=f"{part.name}_norm")
            y = part(norm(x) if self.norm_first else x, **context)
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                y *= self.param(f"{part.name}_scale", init, (y.shape[-1],), jnp.float32).astype(y.dtype)
            y = Dropout(self.dropout, name=f"{part.name}_out_dropout")(y)
            if depth is not None:
                y = DropPath(self.drop_path, name=f"{part.name}_drop_path")(y, depth)
            x += y
            return x if self.norm_first else norm(x)

        shared = {"position_BxTxD": position_BxTxD, "index": index}
        own = {"mask": mask, "bias": bias, "rotary": rotary}
        x_BxTxD = add(x_BxTxD, self.attention(name="attention"), **own, **shared)
        if source_BxSxD is not None:
            source = {"source_BxSxD": source_BxSxD, "source_position_BxSxD": source_position_BxSxD}
            x_BxTxD = add(x_BxTxD, self.attention(name="cross_attention"), mask=source_mask, **source, **shared)
        return add(x_BxTxD, self.mlp(name="mlp"))


def stack(
    block: nn.Module, num_layers: int, x: jax.Array, *, unroll: int = 1, remat: bool = False, **context: Any
) -> jax.Array:
    """Applies `num_layers` blocks in turn, compiled once by a scan over their stacked parameters.

    Args:
      block: the block. Its parameters get a leading axis of length `num_layers`. Name it "layers": `optimizer.py`
        numbers the layers below that name.
      num_layers: how many.
      x: activations, [B, T, D].
      unroll: how many blocks the compiler sees at once; the parameters' layout stays.
      remat: recompute activations in the backward pass instead of keeping them.
      **context: passed to every block.

    Where the parameters come as {"0": those of the first block, ...} the blocks are applied one by one, and their
    caches are kept alike. Decoding does so: a scan copies every layer's weights for every token.
    """
    if block.has_variable("params", "0"):
        return _one_by_one(block, num_layers, x, context)
    return _scan(block, num_layers, x, unroll, remat, context)[0]


def every_output(
    block: nn.Module, num_layers: int, x: jax.Array, *, unroll: int = 1, remat: bool = False, **context: Any
) -> jax.Array:
    """Applies blocks as `stack` does and returns the outputs of all of them, [num_layers, B, T, D]."""
    return _scan(block, num_layers, x, unroll, remat, context, every=True)[1]


def _scan(
    block: nn.Module,
    num_layers: int,
    x: jax.Array,
    unroll: int,
    remat: bool,
    context: dict[str, Any],
    every: bool = False,
) -> tuple[jax.Array, Any]:
    """Returns the output of the last block and, where `every` one is asked for, those of all, stacked."""
    # A share that is 0 everywhere is left out: blocks need not know of depth.
    scanned = {"depth": jnp.linspace(0, 1, num_layers)} if getattr(block, "drop_path", 0.0) else {}

    def step(
        block: nn.Module, x: jax.Array, context: dict[str, Any], own: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        x = block(x, **context, **own)
        return x, x if every else None

    scan = nn.scan(
        nn.remat(step, prevent_cse=False) if remat else step,
        variable_axes={"params": 0, "intermediates": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=num_layers,
        unroll=min(unroll, num_layers),
    )
    return scan(block, x, context, scanned)


def _one_by_one(block: nn.Module, num_layers: int, x: jax.Array, context: dict[str, Any]) -> jax.Array:
    alone, held = block.clone(parent=None), block.variables
    mutable = ["cache"] if block.is_mutable_collection("cache") else []
    for name in map(str, range(num_layers)):
        variables = {collection: every[name] for collection, every in held.items() if name in every}
        x, changed = alone.apply(variables, x, mutable=mutable, **context)
        for collection, value in changed.items():
            block.put_variable(collection, name, value)
    return x
