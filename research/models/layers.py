"""The transformer core that every model shares.

Shape letters: B batch, T query positions, S key positions, D model width, H heads, K width of a head, F feed-forward.
Parameters are float32; `dtype` is what matrix products are computed in; softmax and norms are computed in float32.
Dropout acts where `apply` is given a "dropout" key and is the identity otherwise: only training passes one.
"""

import functools
from collections.abc import Callable
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
    key_BxSxHxK: jax.Array,
    value_BxSxHxK: jax.Array,
    mask: jax.Array | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani 2017, section 3.2.1).

    Args:
      query_BxTxHxK: queries; `key_BxSxHxK` and `value_BxSxHxK` alike.
      mask: bool, broadcastable to [B, H, T, S]; False where attention is forbidden.
      drop: dropout for the attention weights.

    Returns:
      outputs [B, T, H, K] in the queries' dtype and the weights [B, H, T, S] in float32, before dropout.
    """
    scale = query_BxTxHxK.shape[-1] ** -0.5
    scores_BxHxTxS = jnp.einsum(
        "BTHK,BSHK->BHTS", query_BxTxHxK * scale, key_BxSxHxK, preferred_element_type=jnp.float32
    )
    if mask is not None:
        # The lowest finite number, not -inf: a row that may attend to nothing stays finite.
        scores_BxHxTxS = jnp.where(mask, scores_BxHxTxS, jnp.finfo(jnp.float32).min)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    dropped_BxHxTxS = drop(weights_BxHxTxS) if drop else weights_BxHxTxS
    outputs_BxTxHxK = jnp.einsum("BHTS,BSHK->BTHK", dropped_BxHxTxS.astype(value_BxSxHxK.dtype), value_BxSxHxK)
    return outputs_BxTxHxK, weights_BxHxTxS


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

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps integers [...] to [..., features]."""
        table = self.param("embedding", self.embedding_init, (self.vocab_size, self.features), jnp.float32)
        return jnp.take(table, ids, axis=0, mode="fill").astype(self.dtype)


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


class Attention(nn.Module):
    """Multi-head self-attention with its four projections."""

    num_heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; sows the weights [B, H, T, S] as intermediates."""
        batch, length, width = x_BxTxD.shape
        if width % self.num_heads:
            raise UserError(f"hidden_size {width} is not a multiple of num_heads {self.num_heads}")

        def project(name: str) -> jax.Array:
            y = Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name=name)(x_BxTxD)
            return y.reshape(batch, length, self.num_heads, width // self.num_heads)

        outputs_BxTxHxK, weights_BxHxTxS = attention(
            project("query"),
            project("key"),
            project("value"),
            mask,
            Dropout(self.dropout, name="dropout"),
        )
        self.sow("intermediates", "weights", weights_BxHxTxS)
        outputs_BxTxD = outputs_BxTxHxK.reshape(batch, length, width)
        return Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name="out")(outputs_BxTxD)


class MLP(nn.Module):
    """The position-wise feed-forward network."""

    hidden_size: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D] through [B, T, F]."""
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        h_BxTxF = activation(self.activation)(dense(self.hidden_size, name="up")(x_BxTxD))
        return dense(x_BxTxD.shape[-1], name="down")(h_BxTxF)


class PostNormBlock(nn.Module):
    """Attention, then MLP, each normalised after its residual sum (Vaswani 2017; Devlin 2018)."""

    num_heads: int
    intermediate_size: int
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; `mask` is broadcastable to [B, H, T, T]."""
        shared = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        norm = functools.partial(LayerNorm, self.layer_norm_epsilon, dtype=self.dtype)
        y = Attention(self.num_heads, self.attention_dropout, name="attention", **shared)(x_BxTxD, mask)
        x_BxTxD = norm(name="attention_norm")(x_BxTxD + Dropout(self.dropout, name="attention_out_dropout")(y))
        y = MLP(self.intermediate_size, self.activation, name="mlp", **shared)(x_BxTxD)
        return norm(name="mlp_norm")(x_BxTxD + Dropout(self.dropout, name="mlp_out_dropout")(y))


def stack(
    block: nn.Module,
    num_layers: int,
    x: jax.Array,
    mask: jax.Array | None,
    *,
    unroll: int = 1,
    remat: bool = False,
) -> jax.Array:
    """Applies `num_layers` blocks in turn, compiled once by a scan over their stacked parameters.

    Args:
      block: the block, which maps (x, mask) to x. Its parameters get a leading axis of length `num_layers`. Name
        it "layers": `optimizer.py` numbers the layers below that name.
      num_layers: how many.
      x: activations, [B, T, D].
      mask: passed to every block.
      unroll: how many blocks the compiler sees at once; the parameters' layout stays.
      remat: recompute activations in the backward pass instead of keeping them.
    """

    def step(block: nn.Module, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        return block(x, mask), None

    scan = nn.scan(
        nn.remat(step, prevent_cse=False) if remat else step,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=num_layers,
        unroll=min(unroll, num_layers),
    )
    return scan(block, x, mask)[0]
