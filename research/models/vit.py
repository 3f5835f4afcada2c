"""Vision transformers (Dosovitskiy 2020) and their kin: images as sequences of patches.

Shape letters beyond those of `layers`: N patches of an image, row by row; P tokens before them; C channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError, nearest
from research.models import layers
from research.models.attention import Attention
from research.models.blocks import Block, stack


class Patches(nn.Module):
    """Cut images into squares and map each linearly (Dosovitskiy 2020, equation 1).

    Attributes:
      patch_size: the side of a square in pixels.
      hidden_size: D.
      dtype: of the product.
      kernel_init: of the kernel.
      use_bias: whether a bias is added.
    """

    patch_size: int
    hidden_size: int
    dtype: Any = jnp.float32
    kernel_init: layers.Initializer = nn.initializers.normal(0.02)
    use_bias: bool = True

    @nn.compact
    def __call__(self, image_BxHxWxC: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to [B, N, D]."""
        squares_BxNxF = cut(image_BxHxWxC, self.patch_size)
        shape = (self.patch_size, self.patch_size, image_BxHxWxC.shape[-1], self.hidden_size)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).reshape(-1, self.hidden_size)
        out = squares_BxNxF.reshape(-1, kernel.shape[0]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.hidden_size,), jnp.float32).astype(self.dtype)
        return out.reshape(*squares_BxNxF.shape[:2], self.hidden_size)


def cut(image_BxHxWxC: jax.Array, patch_size: int) -> jax.Array:
    """Return the pixels of an image's patches, [B, N, patch_size * patch_size * C], each row by row."""
    batch, height, width, channels = image_BxHxWxC.shape
    rows, columns = grid((height, width), patch_size)
    x = image_BxHxWxC.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, patch_size * patch_size * channels)


def join(squares_BxNxF: jax.Array, shape: Sequence[int], patch_size: int) -> jax.Array:
    """Return the images [B, H, W, C] of height and width `shape` that `cut` cuts into these patches."""
    rows, columns = grid(shape, patch_size)
    x = squares_BxNxF.reshape(squares_BxNxF.shape[0], rows, columns, patch_size, patch_size, -1)
    return x.swapaxes(2, 3).reshape(x.shape[0], *shape, x.shape[-1])


def grid(shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return how many rows and columns of patches an image of height and width `shape` has, or raise UserError."""
    if shape[0] % patch_size or shape[1] % patch_size:
        raise UserError(f"images of {shape[0]} x {shape[1]} pixels cannot be cut into patches of {patch_size}")
    return shape[0] // patch_size, shape[1] // patch_size


def sinusoids_2d(rows: int, columns: int, width: int) -> np.ndarray:
    """Return fixed position embeddings, float32 [rows * columns, width] (He 2021, appendix A.1).

    Sines and cosines of the column, then of the row, at width / 4 frequencies.
    """
    if width % 4:
        raise UserError(f"hidden_size {width} must be a multiple of 4 for positions 'sinusoidal'")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))

    def waves(places: np.ndarray) -> np.ndarray:
        angles = places.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.mgrid[:rows, :columns].astype(np.float64)
    return np.concatenate([waves(column), waves(row)], axis=1).astype(np.float32)


def resample(table_NxD: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Return a table of positions on a grid of `old` rows and columns, interpolated to `new` (bicubic, as PyTorch)."""
    if old == new:
        return table_NxD
    rows, columns = (_cubic(a, b) for a, b in zip(old, new))
    table = jnp.einsum("rR,cC,RCd->rcd", rows, columns, table_NxD.reshape(*old, -1))
    return table.reshape(-1, table_NxD.shape[-1])


def _cubic(old: int, new: int) -> np.ndarray:
    """Return the weights [new, old] of cubic convolution (Keys 1981) with a = -0.75, its edges repeated."""
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old), np.float32)
    for i, centre in enumerate(centres):
        for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - place)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(place, 0), old - 1)] += near if d <= 1 else far
    return weights


class Encoder(nn.Module):
    """The encoder of ViT and its kin.

    Attributes:
      image_size: the side, in pixels, of the square images that the positions are learned for. Images of other sizes
        get theirs by interpolation; sinusoids are computed for every size, never interpolated.
      patch_size: the side of a patch in pixels.
      num_channels: C.
      hidden_size: D, a multiple of `num_heads`.
      num_layers: blocks.
      num_heads: H.
      intermediate_size: F.
      prefix_tokens: P, learned tokens before the patches: 1 is a class token, 0 leaves it out.
      positions: "learned", or "sinusoidal" and fixed, with zeros for the tokens before the patches.
      activation: of the MLP, by its Hugging Face name.
      gated: whether the MLP is gated.
      use_bias: of the projections to queries, keys and values.
      patch_bias: of the embeddings of patches.
      embedding_norm: whether embedded tokens are normalised before the first block (Radford 2021).
      layer_norm_epsilon: of every norm.
      layer_scale: see `blocks.Block`.
      drop_path: see `blocks.Block`.
      dropout: after the embeddings and before each residual sum.
      attention_dropout: on the attention weights.
      initializer_range: standard deviation of the normal initialisation of kernels, tokens and positions.
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    prefix_tokens: int = 1
    positions: str = "learned"
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    patch_bias: bool = True
    embedding_norm: bool = False
    layer_norm_epsilon: float = 1e-6
    layer_scale: float | None = None
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        """Make the embeddings, a block and the last norm."""
        if self.positions not in (kinds := ("learned", "sinusoidal")):
            raise UserError(f"positions: unknown '{self.positions}'{nearest(self.positions, kinds)}")
        dtype, init = jnp.dtype(self.dtype), nn.initializers.normal(self.initializer_range)
        self.patches = Patches(self.patch_size, self.hidden_size, dtype, init, self.patch_bias)
        if self.prefix_tokens:
            self.prefix = self.param("prefix", init, (self.prefix_tokens, self.hidden_size), jnp.float32)
        if self.positions == "learned":
            count = self.prefix_tokens + int(np.prod(self._grid))
            self.position = self.param("position", init, (count, self.hidden_size), jnp.float32)
        self.drop = layers.Dropout(self.dropout, name="dropout")
        shared: dict[str, Any] = {"dtype": dtype, "kernel_init": init}
        norm: Callable[..., nn.Module] = functools.partial(layers.LayerNorm, self.layer_norm_epsilon, dtype=dtype)
        self.layers = Block(
            attention=functools.partial(
                Attention,
                self.num_heads,
                use_bias=self.use_bias,
                dropout=self.attention_dropout,
                implementation=self.attention,
                remat=self.remat,
                **shared,
            ),
            mlp=functools.partial(layers.MLP, self.intermediate_size, self.activation, self.gated, **shared),
            norm=norm,
            dropout=self.dropout,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
        )
        self.norm = norm()
        if self.embedding_norm:
            self.norm_in = norm()

    @property
    def _grid(self) -> tuple[int, int]:
        return grid((self.image_size, self.image_size), self.patch_size)

    def __call__(self, image_BxHxWxC: jax.Array) -> jax.Array:
        """Map images float [B, H, W, C] to hidden states [B, P + N, D] in `dtype`, normalised."""
        return self.encode(jnp.concatenate(self.embed(image_BxHxWxC), axis=1))

    def embed(self, image_BxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the tokens before the patches, [B, P, D], and the patches, [B, N, D], with their positions."""
        batch, height, width, channels = image_BxHxWxC.shape
        if channels != self.num_channels:
            raise UserError(f"images of {channels} channels; config.task.model's num_channels is {self.num_channels}")
        shape, prefix_PxD = grid((height, width), self.patch_size), jnp.zeros((0, self.hidden_size))
        if self.prefix_tokens:
            prefix_PxD = self.prefix
        if self.positions == "learned":
            prefix_PxD = prefix_PxD + self.position[: self.prefix_tokens]  # += would change parameters of numpy's
            position_NxD = resample(self.position[self.prefix_tokens :], self._grid, shape)
        else:
            position_NxD = jnp.asarray(sinusoids_2d(*shape, self.hidden_size))
        patches_BxNxD = self.patches(image_BxHxWxC)
        dtype = patches_BxNxD.dtype
        prefix_BxPxD = layers.for_each(prefix_PxD.astype(dtype), batch)
        return prefix_BxPxD, patches_BxNxD + layers.for_each(position_NxD.astype(dtype), batch)

    def encode(self, x_BxTxD: jax.Array) -> jax.Array:
        """Map embedded tokens, all or some of them, [B, T, D], to hidden states [B, T, D], normalised."""
        if self.embedding_norm:
            x_BxTxD = self.norm_in(x_BxTxD)
        x_BxTxD = stack(self.layers, self.num_layers, self.drop(x_BxTxD), unroll=self.unroll, remat=self.remat)
        return self.norm(x_BxTxD)


def to_image_size(encoder: Encoder, params: dict[str, Any], size: int) -> tuple[Encoder, dict[str, Any]]:
    """Return an encoder for images of `size` pixels a side that computes what this one does, and its parameters."""
    larger, params = encoder.clone(image_size=size), dict(params)
    if encoder.positions == "learned" and size != encoder.image_size:
        prefix_PxD, position_NxD = np.split(params["position"], [encoder.prefix_tokens])
        old, new = (grid((side, side), encoder.patch_size) for side in (encoder.image_size, size))
        params["position"] = np.concatenate([prefix_PxD, np.asarray(resample(jnp.asarray(position_NxD), old, new))])
    return larger, params


POOLINGS = ("token", "mean", "token_and_mean")


class ImageClassifier(nn.Module):
    """An encoder and a linear layer.

    Attributes:
      encoder: maps images to [B, P + N, D].
      num_outputs: classes, labels or regression targets.
      pooling: what the layer is applied to: the first "token", the "mean" of the patches, or both, side by side:
        "token_and_mean" (Oquab 2023).
      head_dropout: before the layer.
    """

    encoder: Encoder
    num_outputs: int
    pooling: str = "token"
    head_dropout: float = 0.0

    inputs: ClassVar[tuple[str, ...]] = ("image",)

    @nn.compact
    def __call__(self, image_BxHxWxC: jax.Array) -> jax.Array:
        """Map images float [B, H, W, C] to logits float32 [B, num_outputs]."""
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling: unknown '{self.pooling}'{nearest(self.pooling, POOLINGS)}")
        prefix = self.encoder.prefix_tokens
        if self.pooling != "mean" and not prefix:
            raise UserError(f"pooling: '{self.pooling}' needs an encoder with prefix_tokens")
        hidden_BxTxD = self.encoder(image_BxHxWxC).astype(jnp.float32)
        token_BxD, mean_BxD = hidden_BxTxD[:, 0], hidden_BxTxD[:, prefix:].mean(axis=1)
        parts = {"token": [token_BxD], "mean": [mean_BxD], "token_and_mean": [token_BxD, mean_BxD]}[self.pooling]
        pooled = jnp.concatenate(parts, axis=-1)
        pooled = layers.Dropout(self.head_dropout, name="head_dropout")(pooled)
        return layers.Dense(self.num_outputs, name="head_output")(pooled)


class DistilledClassifier(nn.Module):
    """An encoder with a class token and a distillation token, and a linear layer for each (Touvron 2021, section 4).

    Attributes:
      encoder: maps images to [B, 2 + N, D].
      num_outputs: classes.
    """

    encoder: Encoder
    num_outputs: int

    inputs: ClassVar[tuple[str, ...]] = ("image",)

    def setup(self):
        """Make the two layers."""
        if self.encoder.prefix_tokens != 2:
            found = self.encoder.prefix_tokens
            raise UserError(f"encoder: a class and a distillation token are 2 prefix_tokens, not {found}")
        self.head_output = layers.Dense(self.num_outputs)
        self.head_distillation = layers.Dense(self.num_outputs)

    def __call__(self, image_BxHxWxC: jax.Array) -> jax.Array:
        """Map images float [B, H, W, C] to the mean of both logits, float32 [B, num_outputs]."""
        label_BxC, teacher_BxC = self.heads(image_BxHxWxC)
        return (label_BxC + teacher_BxC) / 2

    def heads(self, image_BxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the logits of the label and those of what the teacher says, each float32 [B, num_outputs]."""
        hidden_BxTxD = self.encoder(image_BxHxWxC).astype(jnp.float32)
        return self.head_output(hidden_BxTxD[:, 0]), self.head_distillation(hidden_BxTxD[:, 1])
