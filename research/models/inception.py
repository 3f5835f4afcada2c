"""Inception-v3 (Szegedy 2015) as the Frechet inception distance uses it: the network of Heusel 2017, without its head.

It is not quite the one that classifies: means at the edges leave the padding out, and the last block takes maxima. The
names are those of the published files.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

SIZE = 299


class Inception(nn.Module):
    """Map images to features; batch normalisation is folded into the convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images [B, H, W, 3] in [-1, 1], at least 75 pixels wide and high, to float32 [B, 2048]."""
        x = _convolve(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x = _convolve(x, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x = _maximum(_convolve(x, "Conv2d_2b_3x3", 64, (3, 3)))
        x = _convolve(x, "Conv2d_3b_1x1", 80, (1, 1))
        x = _maximum(_convolve(x, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
        for block, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _block_a(x, block, pooled)
        x = _block_b(x, "Mixed_6a")
        for block, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = _block_c(x, block, width)
        x = _block_d(x, "Mixed_7a")
        x = _block_e(x, "Mixed_7b", _mean)
        return _block_e(x, "Mixed_7c", lambda x: _maximum(x, 1)).mean(axis=(1, 2))


def prepare(image: jax.Array) -> jax.Array:
    """Make images in [0, 1], [B, H, W, 1 or 3], what the network sees: 299 x 299 x 3, in [-1, 1]."""
    shape = (image.shape[0], SIZE, SIZE, image.shape[-1])
    resized = 2 * jax.image.resize(image, shape, "linear", antialias=False) - 1
    return jnp.broadcast_to(resized, (*shape[:-1], 3))


def _convolve(
    x: jax.Array, name: str, features: int, kernel: tuple[int, int], stride: int = 1, padding: str = ""
) -> jax.Array:
    """A convolution and ReLU; steps of two are not padded."""
    padding = padding or ("SAME" if stride == 1 else "VALID")
    return nn.relu(nn.Conv(features, kernel, stride, padding, name=name)(x))


def _maximum(x: jax.Array, stride: int = 2) -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), "VALID" if stride == 2 else "SAME")


def _mean(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _chain(x: jax.Array, block: str, *layers: tuple[str, int, tuple[int, int]], stride: int = 1) -> jax.Array:
    """Convolutions in turn, (name, features, kernel) each, the last with the stride."""
    for i, (name, features, kernel) in enumerate(layers, start=1):
        x = _convolve(x, f"{block}.{name}", features, kernel, stride if i == len(layers) else 1)
    return x


def _block_a(x: jax.Array, block: str, pooled: int) -> jax.Array:
    double = (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3)))
    parts = [
        _chain(x, block, ("branch1x1", 64, (1, 1))),
        _chain(x, block, ("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
        _chain(x, block, *double),
        _chain(_mean(x), block, ("branch_pool", pooled, (1, 1))),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_b(x: jax.Array, block: str) -> jax.Array:
    double = (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3)))
    parts = [_chain(x, block, ("branch3x3", 384, (3, 3)), stride=2), _chain(x, block, *double, stride=2), _maximum(x)]
    return jnp.concatenate(parts, axis=-1)


def _block_c(x: jax.Array, block: str, width: int) -> jax.Array:
    across, down = (1, 7), (7, 1)
    single = (("branch7x7_1", width, (1, 1)), ("branch7x7_2", width, across), ("branch7x7_3", 192, down))
    double = [("branch7x7dbl_1", width, (1, 1))]
    double += [(f"branch7x7dbl_{i}", width if i < 5 else 192, across if i % 2 else down) for i in (2, 3, 4, 5)]
    parts = [
        _chain(x, block, ("branch1x1", 192, (1, 1))),
        _chain(x, block, *single),
        _chain(x, block, *double),
        _chain(_mean(x), block, ("branch_pool", 192, (1, 1))),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_d(x: jax.Array, block: str) -> jax.Array:
    long = [("branch7x7x3_1", 192, (1, 1)), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    parts = [
        _chain(x, block, ("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3)), stride=2),
        _chain(x, block, *long, ("branch7x7x3_4", 192, (3, 3)), stride=2),
        _maximum(x),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_e(x: jax.Array, block: str, pool: Callable[[jax.Array], jax.Array]) -> jax.Array:
    single = _chain(x, block, ("branch3x3_1", 384, (1, 1)))
    double = _chain(x, block, ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)))
    parts = [
        _chain(x, block, ("branch1x1", 320, (1, 1))),
        _chain(single, block, ("branch3x3_2a", 384, (1, 3))),
        _chain(single, block, ("branch3x3_2b", 384, (3, 1))),
        _chain(double, block, ("branch3x3dbl_3a", 384, (1, 3))),
        _chain(double, block, ("branch3x3dbl_3b", 384, (3, 1))),
        _chain(pool(x), block, ("branch_pool", 192, (1, 1))),
    ]
    return jnp.concatenate(parts, axis=-1)
