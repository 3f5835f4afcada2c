"""Masked autoencoders (He 2021): an encoder sees a few patches of an image, a small decoder predicts the others.

Shape letters beyond those of `vit`: K patches that are kept; E the decoder's width; F the numbers in a patch of pixels.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.models import layers, vit
from research.models.attention import Attention
from research.models.blocks import Block, stack


class MaskedAutoencoder(nn.Module):
    """Predict the pixels of hidden patches from those of the others.

    The decoder has the encoder's activation, biases, norms, dropout, initial values and dtype, and no dropped paths.
    Its positions are sinusoids, with zeros for the tokens before the patches.

    Attributes:
      encoder: what is kept after pretraining; an `ImageClassifier` has it under the same name.
      decoder_hidden_size: E, a multiple of 4 and of `decoder_num_heads`.
      decoder_num_layers: blocks.
      decoder_num_heads: H.
      decoder_intermediate_size: width of the blocks' hidden layer.
      mask_ratio: share of the patches that are hidden; of N, int(N * (1 - mask_ratio)) are kept.
      normalize_targets: whether predictions are of patches less their mean and over their standard deviation.
    """

    encoder: vit.Encoder
    decoder_hidden_size: int = 512
    decoder_num_layers: int = 8
    decoder_num_heads: int = 16
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    normalize_targets: bool = True

    def setup(self):
        """Make the decoder."""
        encoder = self.encoder
        self.decoder = Decoder(
            hidden_size=self.decoder_hidden_size,
            num_layers=self.decoder_num_layers,
            num_heads=self.decoder_num_heads,
            intermediate_size=self.decoder_intermediate_size,
            num_outputs=encoder.patch_size**2 * encoder.num_channels,
            activation=encoder.activation,
            gated=encoder.gated,
            use_bias=encoder.use_bias,
            layer_norm_epsilon=encoder.layer_norm_epsilon,
            dropout=encoder.dropout,
            attention_dropout=encoder.attention_dropout,
            initializer_range=encoder.initializer_range,
            dtype=encoder.dtype,
            unroll=encoder.unroll,
            remat=encoder.remat,
            attention=encoder.attention,
        )

    def __call__(self, image_BxHxWxC: jax.Array, noise_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Predict every patch from those that are kept.

        Args:
          image_BxHxWxC: images.
          noise_BxN: numbers, one a patch; the patches of the least numbers are kept.

        Returns:
          predictions, float32 [B, N, F], each patch's pixels row by row, and which patches were hidden, bool [B, N].

        Raises:
          UserError: nothing is kept, or nothing hidden.
        """
        tokens_BxTxD, rank_BxN = self.encode(image_BxHxWxC, noise_BxN)
        shape = vit.grid(image_BxHxWxC.shape[1:3], self.encoder.patch_size)
        predictions_BxNxF = self.decoder(tokens_BxTxD, rank_BxN, shape, self.encoder.prefix_tokens)
        kept = tokens_BxTxD.shape[1] - self.encoder.prefix_tokens
        return predictions_BxNxF.astype(jnp.float32), rank_BxN >= kept

    def encode(self, image_BxHxWxC: jax.Array, noise_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode the kept patches alone.

        Returns:
          hidden states [B, P + K, D] of the tokens before the patches and of the kept patches, by ascending noise, and
          each patch's place in that order, int [B, N]: it is kept where that is below K.
        """
        prefix_BxPxD, patches_BxNxD = self.encoder.embed(image_BxHxWxC)
        kept = kept_patches(patches_BxNxD.shape[1], self.mask_ratio)
        order_BxN = jnp.argsort(noise_BxN, axis=1)
        kept_BxKxD = jnp.take_along_axis(patches_BxNxD, order_BxN[:, :kept, None], axis=1)
        tokens_BxTxD = self.encoder.encode(jnp.concatenate([prefix_BxPxD, kept_BxKxD], axis=1))
        return tokens_BxTxD, jnp.argsort(order_BxN, axis=1)


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Return how many patches are kept; raise UserError unless some are and some are not."""
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        raise UserError(f"config.task.model.mask_ratio: {mask_ratio} keeps {kept} of {patches} patches; 0.75 is usual")
    return kept


class Decoder(nn.Module):
    """Put a learned token where a patch was hidden, and map all tokens to pixels (He 2021, section 3).

    Attributes: see `MaskedAutoencoder`; `num_outputs` is F.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_outputs: int
    activation: str
    gated: bool
    use_bias: bool
    layer_norm_epsilon: float
    dropout: float
    attention_dropout: float
    initializer_range: float
    dtype: str
    unroll: int | None
    remat: str
    attention: str

    @nn.compact
    def __call__(
        self, tokens_BxTxD: jax.Array, rank_BxN: jax.Array, shape: tuple[int, int], prefix_tokens: int
    ) -> jax.Array:
        """Map hidden states [B, P + K, D] to predictions [B, N, F].

        Args:
          tokens_BxTxD: the first `prefix_tokens` are no patches.
          rank_BxN: where each patch stands among the rest; it was hidden where that is K or more.
          shape: rows and columns of patches.
          prefix_tokens: P.
        """
        dtype, init = jnp.dtype(self.dtype), nn.initializers.normal(self.initializer_range)
        dense = functools.partial(layers.Dense, dtype=dtype, kernel_init=init)
        x_BxTxE = dense(self.hidden_size, name="embed")(tokens_BxTxD)
        prefix_BxPxE, kept_BxKxE = jnp.split(x_BxTxE, [prefix_tokens], axis=1)
        mask_token_E = self.param("mask_token", init, (self.hidden_size,), jnp.float32).astype(dtype)
        count = kept_BxKxE.shape[1]
        placed_BxNxE = jnp.take_along_axis(kept_BxKxE, jnp.minimum(rank_BxN, count - 1)[..., None], axis=1)
        patches_BxNxE = jnp.where((rank_BxN < count)[..., None], placed_BxNxE, mask_token_E)
        patches_BxNxE += jnp.asarray(vit.sinusoids_2d(*shape, self.hidden_size), dtype)
        x_BxTxE = jnp.concatenate([prefix_BxPxE, patches_BxNxE], axis=1)
        x_BxTxE = stack(self._block(init), self.num_layers, x_BxTxE, unroll=self.unroll, remat=self.remat)
        x_BxTxE = layers.LayerNorm(self.layer_norm_epsilon, dtype, name="norm")(x_BxTxE)
        return dense(self.num_outputs, name="predict")(x_BxTxE[:, prefix_tokens:])

    def _block(self, init: layers.Initializer) -> nn.Module:
        shared: dict[str, Any] = {"dtype": jnp.dtype(self.dtype), "kernel_init": init}
        norm: Callable[..., nn.Module] = functools.partial(
            layers.LayerNorm, self.layer_norm_epsilon, dtype=shared["dtype"]
        )
        return Block(
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
            name="layers",
        )
