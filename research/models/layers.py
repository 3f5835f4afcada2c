"""The transformer core that every model shares.

Shape letters: B batch, T query positions, S key positions, D model width, H heads, G groups of heads that share keys
and values, K width of a head, F feed-forward.
Parameters are float32; `dtype` is what matrix products are computed in; softmax and norms are computed in float32.
Dropout acts where `apply` is given a "dropout" key and is the identity otherwise: only training passes one.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from research.errors import UserError, nearest
from research.sharding import on_each_device, platform

try:
    from research.models import fused_norm
except ImportError:  # JAX 0.12 announces that it will drop what this is written in
    fused_norm = None  # type: ignore[assignment]

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
    """Return the elementwise function of that name, or raise UserError."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation '{name}'{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def in_float32(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return an elementwise function of 16-bit arrays that is computed in float32 and rounded once.

    Its backward pass keeps the arguments alone and computes the rest again: what a GELU would keep takes as much as its
    argument does, and time to write and read. Functions of float32 arrays stay as they are, as CPUs are bound by
    arithmetic.
    """

    @jax.custom_vjp
    def rounded(*arguments: jax.Array) -> jax.Array:
        dtype = arguments[0].dtype
        return function(*(x.astype(jnp.float32) for x in arguments)).astype(dtype)

    def backward(arguments: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        arguments = jax.lax.optimization_barrier(arguments)  # or the compiler keeps what is to be recomputed
        _, transpose = jax.vjp(rounded.fun, *arguments)
        return transpose(cotangent)

    rounded.defvjp(lambda *arguments: (rounded(*arguments), arguments), backward)

    def chosen(*arguments: jax.Array) -> jax.Array:
        return (function if arguments[0].dtype == jnp.float32 else rounded)(*arguments)

    return chosen


def activate_biased(function: Callable[[jax.Array], jax.Array], y: jax.Array, bias: jax.Array) -> jax.Array:
    """Return `function(y + bias)` of a product y [N, F] of 16 bits and a float32 bias [F], as `in_float32` would.

    The backward pass keeps the product as it came, so that the sum is never written.
    """

    @jax.custom_vjp
    def activated(y: jax.Array, bias: jax.Array) -> jax.Array:
        return function(y.astype(jnp.float32) + bias).astype(y.dtype)

    def backward(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, bias = jax.lax.optimization_barrier(kept)
        _, transpose = jax.vjp(lambda y: function(y.astype(jnp.float32) + bias), y)
        (by_y,) = transpose(cotangent.astype(jnp.float32))
        # On an H200 one pass for both took GPT-2 243 us; rows are written faster than columns are added up.
        summed = jax.lax.optimization_barrier(by_y) if platform() == "gpu" else by_y
        return by_y, summed.astype(jnp.float32).sum(axis=0)

    activated.defvjp(lambda y, bias: (activated(y, bias), (y, bias)), backward)
    return activated(y, bias)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Return x bent by tanh so that its magnitude stays below `cap` (Bello 2016; Gemma Team 2024, section 2)."""
    return cap * jnp.tanh(x / cap)


class Dropout(nn.Module):
    """Dropout (Srivastava 2014) that acts where a "dropout" key is given."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x with a share `rate` of its values zeroed and the rest scaled up."""
        key = self.key()
        return x if key is None else drop(x, key, self.rate, flat_positions(x.shape))

    @nn.nowrap
    def key(self) -> jax.Array | None:
        """Return the key that decides what is dropped; None where nothing is."""
        if not 0 <= self.rate < 1:
            raise UserError(f"a dropout rate must lie in [0, 1); one is {self.rate}")
        return self.make_rng("dropout") if self.rate and self.has_rng("dropout") else None


class DropPath(nn.Module):
    """Stochastic depth (Huang 2016): drops all that a block adds to some examples, where a "dropout" key is given."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, depth: jax.Array) -> jax.Array:
        """Return x [B, ...] with a share `rate * depth` of the examples zeroed and the rest scaled up."""
        if not 0 <= self.rate < 1:
            raise UserError(f"a drop_path rate must lie in [0, 1); one is {self.rate}")
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        kept = 1.0 - self.rate * depth
        factors_B = (jax.random.uniform(self.make_rng("dropout"), x.shape[:1]) < kept) / kept
        return x * factors_B.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def drop(x: jax.Array, key: jax.Array, rate: float, positions: jax.Array) -> jax.Array:
    """Return x with a share `rate` of its values zeroed and the rest scaled up.

    What is dropped is a function of the key and of uint32 `positions`, as large as x, alone: a part of an array, given
    its positions in the whole, is treated as it would be there.
    """
    keep = random_bits(*words(key), positions) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), jnp.zeros_like(x))


def flat_positions(shape: tuple[int, ...]) -> jax.Array:
    """Return where each value of an array of that shape stands in it, row by row, as uint32 of that shape."""
    positions, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        positions += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return positions


def random_bits(first: jax.Array, second: jax.Array, positions: jax.Array) -> jax.Array:
    """Return uint32 bits, a hash of two words and the positions, by the rounds of lowbias32 (Wellons 2018).

    Threefry would do, but took a CPU three seconds longer to compile and a tenth of a step longer to run; a mask needs
    no more than bits that are even and unrelated between positions and keys.
    """
    bits = positions ^ first
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) + second
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def words(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two words of a key that `random_bits` takes."""
    first, second = jax.random.key_data(key).reshape(-1)[:2].astype(jnp.uint32)
    return first, second


def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum of two arrays of one dtype, accumulated and returned in float32.

    Its gradients are products in the operands' dtype too: plain `preferred_element_type=float32` would make those of
    bfloat16 operands float32 (TF32 on a GPU), several times as slow.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(subscripts, a, b)
    return _low_precision_product(subscripts, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_precision_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _product_forward(subscripts: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _low_precision_product(subscripts, a, b), (a, b)


def _product_backward(
    subscripts: str, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, transpose = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    return transpose(cotangent.astype(operands[0].dtype))


_low_precision_product.defvjp(_product_forward, _product_backward)


class Dense(nn.Module):
    """A linear layer on the last axis; the others are flattened, as 2-D products run faster on CPUs."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array, activate: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """Map [..., D] to [..., features], in `dtype`, and apply an elementwise function where one is given."""
        y = self.multiply(x.reshape(-1, x.shape[-1]))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            if activate is not None and y.dtype != jnp.float32:
                y, activate = activate_biased(activate, y, bias), None
            else:
                y += bias.astype(self.dtype)
        if activate is not None:
            y = in_float32(activate)(y)
        return y.reshape(*x.shape[:-1], self.features)

    def multiply(self, x_NxD: jax.Array) -> jax.Array:
        """Return x times the kernel, [N, features] in `dtype`; called by the layer alone."""
        kernel = self.param("kernel", self.kernel_init, (x_NxD.shape[-1], self.features), jnp.float32)
        return x_NxD.astype(self.dtype) @ kernel.astype(self.dtype)


class Embedding(nn.Module):
    """A table [vocabulary, features] indexed by integers; an id beyond the table yields NaN, never a wrong row."""

    vocab_size: int
    features: int
    dtype: Any = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(0.02)

    def setup(self):
        """Make the table."""
        self.embedding = self.param("embedding", self.embedding_init, (self.vocab_size, self.features), jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map integers [...] to [..., features]."""
        return jnp.take(self.embedding, ids, axis=0, mode="fill").astype(self.dtype)

    def first(self) -> jax.Array:
        """Return what the id 0 maps to, [features]."""
        return self.embedding[0].astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Map [..., features] to its products with every row of the table, [..., vocabulary] in `dtype`."""
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        scores = jnp.einsum("nd,vd->nv", flat, self.embedding.astype(self.dtype))
        return scores.reshape(*x.shape[:-1], self.vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Return x [..., D] less its mean over its standard deviation, scaled and shifted, in float32.

    `scale` and `bias` are float32 and broadcast to x. The backward pass keeps x as it came and two numbers a row, and
    computes the rest again: float32 copies of bfloat16 activations would take four times as much.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, Any]:
    x_32 = x.astype(jnp.float32)
    mean = x_32.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x_32 - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (x_32 - mean) * inverse * scale + bias, (x, mean, inverse, scale, bias)


def _layer_norm_backward(epsilon: float, kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale, bias = jax.lax.optimization_barrier(kept)  # or the compiler keeps what is to be recomputed
    normal = (x.astype(jnp.float32) - mean) * inverse
    scaled = cotangent * scale
    along = (scaled * normal).mean(axis=-1, keepdims=True)
    by_x = inverse * (scaled - scaled.mean(axis=-1, keepdims=True) - normal * along)
    return by_x.astype(x.dtype), _sum_to(cotangent * normal, scale), _sum_to(cotangent, bias)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Return x [..., D] over its root mean square, scaled, in float32; see `layer_norm`."""
    return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, Any]:
    x_32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(x_32).mean(axis=-1, keepdims=True) + epsilon)
    return x_32 * inverse * scale, (x, inverse, scale)


def _rms_norm_backward(epsilon: float, kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, inverse, scale = jax.lax.optimization_barrier(kept)
    normal, scaled = x.astype(jnp.float32) * inverse, cotangent * scale
    by_x = inverse * (scaled - normal * (scaled * normal).mean(axis=-1, keepdims=True))
    return by_x.astype(x.dtype), _sum_to(cotangent * normal, scale)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return x summed over the dimensions over which `like` was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - like.ndim)))
    wide = tuple(axis for axis, size in enumerate(like.shape) if size == 1 and x.shape[axis] > 1)
    return x.sum(axis=wide, keepdims=True)


def for_each(rows_TxD: jax.Array, batch: int) -> jax.Array:
    """Return the same rows for every example, [B, T, D]."""
    every_BxTxD = jnp.broadcast_to(rows_TxD, (batch, *rows_TxD.shape))
    return _row_by_row(every_BxTxD) if platform() == "gpu" else every_BxTxD


@jax.custom_vjp
def _row_by_row(x: jax.Array) -> jax.Array:
    """Return `x`, whose gradient then lies row by row in memory.

    It is to be summed over the batch, for whose sake the compiler was seen to put the batch last in memory in the whole
    of GPT-2, and to transpose at every norm.
    """
    return x


def _lie_row_by_row(kept: None, cotangent: jax.Array) -> tuple[jax.Array]:
    rows_first = Layout(tuple(range(cotangent.ndim)))
    return (on_each_device(lambda x: with_layout_constraint(x, rows_first), cotangent),)


_row_by_row.defvjp(lambda x: (x, None), _lie_row_by_row)


def _fuses(x: jax.Array) -> bool:
    """Return whether a kernel makes norms of x."""
    served = fused_norm is not None and platform() == "gpu" and x.dtype in (jnp.bfloat16, jnp.float16)
    return served and x.ndim > 1 and x.shape[-1] in fused_norm.WIDTHS


class LayerNorm(nn.Module):
    """Layer normalisation (Ba 2016) over the last axis, computed in float32; `use_bias` says whether it shifts."""

    epsilon: float = 1e-12
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., D] to [..., D], in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = jnp.zeros_like(scale)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        if _fuses(x):
            return fused_norm.norm(x, scale, bias, fused_norm.Options(True, self.epsilon, self.dtype))
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang 2019) over the last axis, computed in float32."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., D] to [..., D], in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        if _fuses(x):
            options = fused_norm.Options(False, self.epsilon, self.dtype)
            return fused_norm.norm(x, scale, jnp.zeros_like(scale), options)
        return rms_norm(x, scale, self.epsilon).astype(self.dtype)


NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}


def norm(name: str) -> type[nn.Module]:
    """Return the normalisation of that name, or raise UserError."""
    if name not in NORMS:
        raise UserError(f"unknown norm '{name}'{nearest(name, NORMS)}")
    return NORMS[name]


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
        """Map [B, T, D] to [B, T, D] through [B, T, F]."""
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)
        activate = activation(self.activation)
        up = dense(self.hidden_size, kernel_init=self.kernel_init, name="up")
        if self.gated:
            gate_BxTxF = dense(self.hidden_size, kernel_init=self.kernel_init, name="gate")(x_BxTxD)
            h_BxTxF = in_float32(lambda h, gate: h * activate(gate))(up(x_BxTxD), gate_BxTxF)
        else:
            h_BxTxF = up(x_BxTxD, activate)
        h_BxTxF = Dropout(self.dropout, name="dropout")(h_BxTxF)
        return dense(x_BxTxD.shape[-1], kernel_init=self.out_init or self.kernel_init, name="down")(h_BxTxF)
