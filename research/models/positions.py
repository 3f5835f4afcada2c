"""Where tokens stand: counted, sinusoidal, rotary and relative positions.

Shape letters as in `layers`.
"""

import math
from collections.abc import Mapping
from typing import Any

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


def rotary_angles(
    positions_BxT: jax.Array, width: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return sine and cosine, float32 [B, T, 1, K/2], of rotary position embeddings (Su 2021, section 3.4).

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
    """Keep short wavelengths, stretches long ones by the factor, and goes smoothly from one to the other."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling["factor"]


def rotate(x_BxTxHxK: jax.Array, sine: jax.Array, cosine: jax.Array) -> jax.Array:
    """Rotate each pair of a dimension in the first half and its counterpart in the second half by its angle."""
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


def sinusoids(positions_BxT: jax.Array, width: int) -> jax.Array:
    """Return the position embeddings of Vaswani 2017 (section 3.5), float32 [B, T, D]: all sines, then all cosines."""
    frequencies = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions_BxT[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


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
        """Return [1, H, T, S] for T queries, the first of which stands at `index` of S keys."""
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
