"""Where tokens stand: counted, sinusoidal, rotary and relative positions.

Shape letters as in `layers`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError, nearest
from research.models.layers import Initializer


def positions(numbers_BxS: jax.Array | None, shape: tuple[int, ...], index: jax.Array | int = 0) -> jax.Array:
    """Return the positions, int32 [B, T], of the tokens from `index` on: rows count what is no padding, from 0."""
    if numbers_BxS is None:
        return jnp.broadcast_to(index + jnp.arange(shape[1]), shape)
    counts_BxS = jnp.maximum(jnp.cumsum((numbers_BxS != 0).astype(jnp.int32), axis=1) - 1, 0)
    return jax.lax.dynamic_slice_in_dim(counts_BxS, index, shape[1], 1)


def longest(numbers_BxS: jax.Array | None, length: int, positions_BxT: jax.Array | None = None) -> jax.Array | int:
    """Return how many tokens the longest sequence of a batch has, int32 []; in a cache those still to come count.

    Args:
      numbers_BxS: 0 at padding; None where there is none.
      length: the length of the rows.
      positions_BxT: where tokens stand, if that is not their number in the row.
    """
    if positions_BxT is not None:
        return positions_BxT.max() + 1
    return length if numbers_BxS is None else (numbers_BxS != 0).sum(axis=1).max()


def rotary_angles(
    positions_BxT: jax.Array,
    width: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    length: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Return sine and cosine, float32 [B, T, 1, K/2], of rotary position embeddings (Su 2021, section 3.4).

    Args:
      positions_BxT: positions.
      width: K, even.
      theta: the base of the geometric series of wavelengths.
      scaling: how wavelengths are stretched, as config.json has it: None, or a "rope_type" of `SCALINGS` and its keys.
        "yarn" and "longrope" also multiply sine and cosine by a factor, so that scores are scaled by its square.
      length: see `longest`; "dynamic" and "longrope" depend on it.
    """
    if width % 2:
        raise UserError(f"rotary positions need heads of an even width, not {width}")
    scaling = scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind not in SCALINGS:
        raise UserError(f"unknown rope_type '{kind}'{nearest(kind, SCALINGS)}")
    if missing := [key for key in SCALINGS[kind].needed if scaling.get(key) is None]:
        raise UserError(f"rotary positions of rope_type '{kind}' need {missing[0]}")
    angles = positions_BxT[:, :, None, None].astype(jnp.float32)
    angles *= SCALINGS[kind].frequencies(width, theta, scaling, length)
    factor = SCALINGS[kind].factor(scaling)
    return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def _frequencies(width: int, theta: jax.Array | float, scaling: Mapping[str, Any], length: Any = 0) -> jax.Array:
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def _linear(width: int, theta: float, scaling: Mapping[str, Any], length: jax.Array | int) -> jax.Array:
    return _frequencies(width, theta, scaling) / scaling["factor"]


def _llama3(width: int, theta: float, scaling: Mapping[str, Any], length: jax.Array | int) -> jax.Array:
    """Keep short wavelengths, stretch long ones by the factor, and go smoothly from one to the other."""
    frequencies = _frequencies(width, theta, scaling)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling["factor"]


def _dynamic(width: int, theta: float, scaling: Mapping[str, Any], length: jax.Array | int) -> jax.Array:
    """Raise the base for sequences beyond the original length, the more the longer they are."""
    if width < 4:
        raise UserError(f"rotary positions of rope_type 'dynamic' need heads of a width of 4 or more, not {width}")
    factor = scaling["factor"]
    beyond = jnp.maximum(jnp.asarray(length, jnp.float32) / scaling["original_max_position_embeddings"], 1.0)
    return _frequencies(width, theta * (factor * beyond - (factor - 1.0)) ** (width / (width - 2)), scaling)


def _yarn(width: int, theta: float, scaling: Mapping[str, Any], length: jax.Array | int) -> jax.Array:
    """Keep what turns `beta_fast` times or more in the original length, stretch what turns `beta_slow` times or less.

    Between them a ramp over the dimensions (Peng 2023, section 3.2).
    """
    original = scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32.0), dimension(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = jnp.clip((jnp.arange(width // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = _frequencies(width, theta, scaling)
    return frequencies * (1.0 - ramp) + frequencies / scaling["factor"] * ramp


def _yarn_factor(scaling: Mapping[str, Any]) -> float:
    """Return what sine and cosine are multiplied by (Peng 2023, section 3.3), with two weights in DeepSeek's models."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    grown = 0.1 * math.log(max(scaling["factor"], 1.0))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return (scaling["mscale"] * grown + 1.0) / (scaling["mscale_all_dim"] * grown + 1.0)
    return grown + 1.0


def _longrope(width: int, theta: float, scaling: Mapping[str, Any], length: jax.Array | int) -> jax.Array:
    """Divide each frequency by a searched factor of its own: one set up to the original length, one beyond it."""
    short, long = (jnp.asarray(scaling[key], jnp.float32) for key in ("short_factor", "long_factor"))
    if not short.shape == long.shape == (width // 2,):
        raise UserError(
            f"rotary positions of rope_type 'longrope' need {width // 2} values of short_factor and long_factor each, "
            f"not {short.size} and {long.size}"
        )
    factors = jnp.where(length > scaling["original_max_position_embeddings"], long, short)
    return _frequencies(width, theta, scaling) / factors


def _longrope_factor(scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    return math.sqrt(
        1.0 + math.log(max(scaling["factor"], 1.0)) / math.log(scaling["original_max_position_embeddings"])
    )


class Scaling(NamedTuple):
    """One way to stretch rotary wavelengths.

    Attributes:
      frequencies: of K, the base, the keys and the length: see `rotary_angles`.
      needed: keys besides the "rope_type".
      optional: keys that may be absent or null.
      factor: what sine and cosine are multiplied by.
    """

    frequencies: Callable[[int, float, Mapping[str, Any], jax.Array | int], jax.Array]
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    factor: Callable[[Mapping[str, Any]], float] = lambda scaling: 1.0


# By their names in config.json: Chen 2023; Grattafiori 2024, section 3.2; bloc97 and emozilla, as told by Peng 2023,
# section 3.3; Peng 2023; Ding 2024.
SCALINGS = {
    "default": Scaling(_frequencies),
    "linear": Scaling(_linear, ("factor",)),
    "llama3": Scaling(_llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "dynamic": Scaling(_dynamic, ("factor", "original_max_position_embeddings")),
    "yarn": Scaling(
        _yarn,
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
        _yarn_factor,
    ),
    "longrope": Scaling(
        _longrope,
        ("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
        ("attention_factor",),
        _longrope_factor,
    ),
}


def rotate(x_BxTxHxK: jax.Array, sine: jax.Array, cosine: jax.Array) -> jax.Array:
    """Rotate each pair of a dimension in the first half and its counterpart in the second half by its angle.

    Dimensions beyond those that there are angles for stay as they are.
    """
    half = sine.shape[-1]
    first, second, rest = jnp.split(x_BxTxHxK.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


def sinusoids(positions_BxT: jax.Array, width: int) -> jax.Array:
    """Return the position embeddings of Vaswani 2017 (section 3.5), float32 [B, T, D]: all sines, then all cosines."""
    frequencies = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions_BxT[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


def by_distance(bias_HxN: jax.Array, length: int) -> jax.Array:
    """Return for each of T = `length` queries i and of the keys j what stands at j - i + T - 1, [H, T, N - T + 1].

    Copies of a row that are one longer, cut into rows that are not, are shifted by one each: no lookup, whose gradient
    would be slow.
    """
    heads, count = bias_HxN.shape
    longer = jnp.concatenate([bias_HxN[:, length - 1 :], jnp.zeros((heads, 1)), bias_HxN[:, : length - 1]], axis=1)
    copies = jnp.broadcast_to(longer[:, None], (heads, length, count + 1)).reshape(heads, -1)
    return copies[:, : length * count].reshape(heads, length, count)[:, :, : count - length + 1]


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
        """Return [H, T + S - 1] for T queries, the first of which stands at `index` of S keys; see `by_distance`."""
        table = self.param("embedding", self.embedding_init, (self.num_buckets, self.num_heads), jnp.float32)
        distances_N = jnp.arange(1 - length, keys) - index
        return table[self._buckets(distances_N)].T

    def _buckets(self, distances: jax.Array) -> jax.Array:
        buckets, base = self.num_buckets, jnp.zeros_like(distances)
        if self.bidirectional:
            buckets //= 2
            base, distances = jnp.where(distances > 0, buckets, 0), jnp.abs(distances)
        else:
            distances = jnp.maximum(-distances, 0)
        return base + jnp.asarray(self._table(buckets))[jnp.minimum(distances, self.max_distance)]

    def _table(self, buckets: int) -> list[int]:
        """Return the bucket of every distance up to the greatest.

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
