"""The diffusion transformer (Peebles 2022): a noisy image, the time and a class -> what the noise is.

Shape letters beyond those of `layers` and `vit`: U channels of the output, C or 2C.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.models import layers, vit
from research.models.attention import Attention
from research.models.blocks import stack

TIME_WAVES = 256
_XAVIER = nn.initializers.xavier_uniform()
# The published code makes queries, keys and values by one layer, whose fan-out is three times theirs.
_ONE_OF_THREE = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
_NORMAL = nn.initializers.normal(0.02)


def _as_linear(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialise the kernel of the patches as that of a linear layer of their pixels."""
    return _XAVIER(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def time_waves(time_B: jax.Array) -> jax.Array:
    """Return cosines, then sines, of the time at frequencies from 1 to 1/10000, float32 [B, 256].

    As Ho 2020 and Diffusers have it; the authors' own code stops one step before the last frequency.
    """
    half = TIME_WAVES // 2
    # PyTorch takes the exponents in float32: at time 999 that shows in the fifth decimal of the waves.
    exponents = np.arange(half, dtype=np.float32) * -np.log(np.float32(10000)) / np.float32(half - 1)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = time_B.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def normalize(x_BxNxD: jax.Array, shift_BxD: jax.Array, scale_BxD: jax.Array, epsilon: float) -> jax.Array:
    """Adaptive layer normalisation: what is learned elsewhere of the condition shifts and scales; in float32."""
    scale_Bx1xD, shift_Bx1xD = (x.astype(jnp.float32)[:, None] for x in (1 + scale_BxD, shift_BxD))
    return layers.layer_norm(x_BxNxD, scale_Bx1xD, shift_Bx1xD, epsilon).astype(x_BxNxD.dtype)


class TimeEmbedding(nn.Module):
    """Embed the time by its waves and an MLP."""

    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, time_B: jax.Array) -> jax.Array:
        """Map times [B] to [B, D]."""
        dense = functools.partial(layers.Dense, self.hidden_size, dtype=self.dtype, kernel_init=_NORMAL)
        return dense(name="down")(jax.nn.silu(dense(name="up")(time_waves(time_B))))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero): a new block is the identity.

    Attributes:
      attention: makes an `Attention` of a name.
      mlp: makes an `MLP`.
      mlp_norm_epsilon: of the second norm; that of the first is 1e-6.
      dropout: on what attention adds.
      dtype: of the products.
    """

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    mlp_norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxNxD: jax.Array, *, condition_BxD: jax.Array) -> jax.Array:
        """Map [B, N, D] to [B, N, D]."""
        width, zeros = x_BxNxD.shape[-1], nn.initializers.zeros
        modulation = layers.Dense(6 * width, dtype=self.dtype, kernel_init=zeros, name="modulation")(condition_BxD)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(modulation, 6, axis=-1)
        y = self.attention(name="attention")(normalize(x_BxNxD, shift, scale, 1e-6))
        x_BxNxD += gate[:, None] * layers.Dropout(self.dropout, name="attention_out_dropout")(y)
        y = self.mlp(name="mlp")(normalize(x_BxNxD, mlp_shift, mlp_scale, self.mlp_norm_epsilon))
        return x_BxNxD + mlp_gate[:, None] * y


class DiT(nn.Module):
    """The diffusion transformer; with its default values XL/2 on the latents of 256 x 256 pixels.

    Attributes:
      image_size: the side of the square images, or latents, in pixels.
      patch_size: the side of a patch.
      num_channels: C.
      num_classes: classes; the label `num_classes` stands for none, as guidance needs it.
      hidden_size: D, a multiple of `num_heads`.
      num_layers: blocks.
      num_heads: H.
      intermediate_size: F.
      learned_variance: whether there are C more outputs, that say where the variance lies between its bounds.
      activation: of the MLP, by its Hugging Face name.
      use_bias: of the projections to queries, keys and values.
      mlp_norm_epsilon: see `Block`.
      dropout: on what attention adds and on the hidden layer of the MLP.
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
    """

    image_size: int = 32
    patch_size: int = 2
    num_channels: int = 4
    num_classes: int = 1000
    hidden_size: int = 1152
    num_layers: int = 28
    num_heads: int = 16
    intermediate_size: int = 4608
    learned_variance: bool = True
    activation: str = "gelu_pytorch_tanh"
    use_bias: bool = True
    mlp_norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return self.image_size, self.image_size, self.num_channels

    @nn.compact
    def __call__(self, image_BxHxWxC: jax.Array, time_B: jax.Array, label_B: jax.Array) -> jax.Array:
        """Map noisy images, times (in steps of training, 0 to 999, whole or not) and classes to float32 [B, H, W, U].

        Raises:
          UserError: images of another shape.
        """
        if image_BxHxWxC.shape[1:] != self.shape:
            found, wanted = (" x ".join(map(str, shape)) for shape in (image_BxHxWxC.shape[1:], self.shape))
            raise UserError(f"config.task.model: it is for images of {wanted}; the data's are {found}")
        dtype, zeros = jnp.dtype(self.dtype), nn.initializers.zeros
        x_BxNxD = vit.Patches(self.patch_size, self.hidden_size, dtype, _as_linear, name="patches")(image_BxHxWxC)
        rows, columns = vit.grid(self.shape[:2], self.patch_size)
        x_BxNxD += jnp.asarray(vit.sinusoids_2d(rows, columns, self.hidden_size), dtype)
        condition_BxD = TimeEmbedding(self.hidden_size, dtype, name="time")(time_B)
        condition_BxD += layers.Embedding(self.num_classes + 1, self.hidden_size, dtype, name="label")(label_B)
        condition_BxD = jax.nn.silu(condition_BxD)
        options: dict[str, Any] = {"unroll": self.unroll, "remat": self.remat}
        x_BxNxD = stack(self._block(dtype), self.num_layers, x_BxNxD, **options, condition_BxD=condition_BxD)
        modulation = layers.Dense(2 * self.hidden_size, dtype=dtype, kernel_init=zeros, name="modulation")
        shift, scale = jnp.split(modulation(condition_BxD), 2, axis=-1)
        features = self.patch_size**2 * self.num_channels * (2 if self.learned_variance else 1)
        output = layers.Dense(features, dtype=dtype, kernel_init=zeros, name="output")
        squares_BxNxF = output(normalize(x_BxNxD, shift, scale, 1e-6))
        return vit.join(squares_BxNxF, self.shape[:2], self.patch_size).astype(jnp.float32)

    def _block(self, dtype: Any) -> Block:
        attention = functools.partial(
            Attention,
            self.num_heads,
            use_bias=self.use_bias,
            dtype=dtype,
            kernel_init=_ONE_OF_THREE,
            out_init=_XAVIER,
            implementation=self.attention,
            remat=self.remat,
        )
        mlp = functools.partial(
            layers.MLP, self.intermediate_size, self.activation, dropout=self.dropout, dtype=dtype, kernel_init=_XAVIER
        )
        return Block(attention, mlp, self.mlp_norm_epsilon, self.dropout, dtype, name="layers")
