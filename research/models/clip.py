"""Encoders of images and of texts into one space: CLIP (Radford 2021) and SigLIP (Zhai 2023).

Shape letters beyond those of `vit`: E the width of the common space.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.models import layers, vit
from research.models.attention import Attention
from research.models.blocks import Block, stack
from research.models.structure import Structure


class TextEncoder(nn.Module):
    """A transformer on tokens with learned positions, normalised before each part and at the end.

    Attributes:
      vocab_size: rows of the word table.
      hidden_size: D, a multiple of `num_heads`.
      num_layers: blocks.
      num_heads: H.
      intermediate_size: F.
      max_positions: rows of the position table.
      causal: whether tokens attend to no later ones.
      activation: of the MLP, by its Hugging Face name.
      layer_norm_epsilon: of every norm.
      dropout: after the embeddings and before each residual sum.
      attention_dropout: on the attention weights.
      initializer_range: standard deviation of the normal initialisation of kernels and tables.
      dtype: what matrix products are computed in; parameters stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    intermediate_size: int = 2048
    max_positions: int = 77
    causal: bool = True
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        """Make the tables, a block and the last norm."""
        dtype, init = jnp.dtype(self.dtype), nn.initializers.normal(self.initializer_range)
        table = functools.partial(layers.Embedding, features=self.hidden_size, dtype=dtype, embedding_init=init)
        self.word, self.position = table(self.vocab_size), table(self.max_positions)
        self.drop = layers.Dropout(self.dropout)
        shared: dict[str, Any] = {"dtype": dtype, "kernel_init": init}
        norm = functools.partial(layers.LayerNorm, self.layer_norm_epsilon, dtype=dtype)
        self.layers = Block(
            attention=functools.partial(
                Attention,
                self.num_heads,
                dropout=self.attention_dropout,
                implementation=self.attention,
                remat=self.remat,
                **shared,
            ),
            mlp=functools.partial(layers.MLP, self.intermediate_size, self.activation, **shared),
            norm=norm,
            dropout=self.dropout,
        )
        self.norm = norm()

    def __call__(self, input_ids_BxT: jax.Array, attention_mask_BxT: jax.Array | None = None) -> jax.Array:
        """Map token ids int32 [B, T] to hidden states [B, T, D] in `dtype`; the mask is 0 at padding, which is last."""
        length = input_ids_BxT.shape[1]
        x_BxTxD = self.word(input_ids_BxT) + self.position(jnp.arange(length))
        structure = Structure.within(attention_mask_BxT, length, causal=self.causal)
        x_BxTxD = self.drop(x_BxTxD)
        x_BxTxD = stack(
            self.layers, self.num_layers, x_BxTxD, structure=structure, unroll=self.unroll, remat=self.remat
        )
        return self.norm(x_BxTxD)


class Clip(nn.Module):
    """CLIP: images by their class token, texts by their end token, each projected.

    Attributes:
      image: the encoder of images, with a class token.
      text: the encoder of texts.
      projection_size: E.
      end_id: the end token; a text that lacks it is represented by NaN.
      scale: what similarities are multiplied by at the start; it is learned, as its logarithm.
    """

    image: vit.Encoder
    text: TextEncoder
    projection_size: int = 512
    end_id: int = 49407
    scale: float = 1 / 0.07

    inputs: ClassVar[tuple[str, ...]] = ("image", "input_ids", "attention_mask")

    def setup(self):
        """Make the projections and the scale."""
        project = functools.partial(layers.Dense, self.projection_size, False)
        self.image_projection = project(kernel_init=nn.initializers.normal(self.image.hidden_size**-0.5))
        self.text_projection = project(kernel_init=nn.initializers.normal(self.text.hidden_size**-0.5))
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(self.scale)), (), jnp.float32)

    def __call__(
        self, image_BxHxWxC: jax.Array, input_ids_BxT: jax.Array, attention_mask_BxT: jax.Array | None = None
    ) -> jax.Array:
        """Map images and texts to the logits float32 [B, B] of every image with every text."""
        return self.logits(self.encode_image(image_BxHxWxC), self.encode_text(input_ids_BxT, attention_mask_BxT))

    def encode_image(self, image_BxHxWxC: jax.Array) -> jax.Array:
        """Map images float [B, H, W, C] to unit vectors float32 [B, E]."""
        if not self.image.prefix_tokens:
            raise UserError("image: CLIP needs an encoder with a class token, prefix_tokens=1")
        return _unit(self.image_projection(self.image(image_BxHxWxC)[:, 0].astype(jnp.float32)))

    def encode_text(self, input_ids_BxT: jax.Array, attention_mask_BxT: jax.Array | None = None) -> jax.Array:
        """Map token ids int32 [B, T] to unit vectors float32 [B, E]."""
        hidden_BxTxD = self.text(input_ids_BxT, attention_mask_BxT)
        ends_BxT = input_ids_BxT == self.end_id
        end_BxD = jnp.take_along_axis(hidden_BxTxD, ends_BxT.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        vectors_BxE = _unit(self.text_projection(end_BxD.astype(jnp.float32)))
        return jnp.where(ends_BxT.any(axis=1, keepdims=True), vectors_BxE, jnp.nan)

    def logits(self, images_BxE: jax.Array, texts_CxE: jax.Array, most: float = math.inf) -> jax.Array:
        """Return the scaled similarities float32 [B, C]; `most` bounds the scale (Radford 2021, section 2.5)."""
        return jnp.exp(jnp.minimum(self.logit_scale, math.log(most))) * (images_BxE @ texts_CxE.T)


class SigLip(nn.Module):
    """SigLIP: images by attention over all patches, texts by their last place, which is padding where a text is short.

    No mask hides padding, so that texts must be as long as they were in training: `text.max_positions`.

    Attributes:
      image: the encoder of images.
      text: the encoder of texts, not causal, whose output is projected to the width of `image`.
      scale: what similarities are multiplied by at the start; it is learned, as its logarithm.
      bias: what is added to them at the start; it is learned (Zhai 2023, section 3.2).
    """

    image: vit.Encoder
    text: TextEncoder
    scale: float = 10.0
    bias: float = -10.0

    inputs: ClassVar[tuple[str, ...]] = ("image", "input_ids")

    def setup(self):
        """Make the pooling, the projection, the scale and the bias."""
        self.pool = AttentionPool(
            self.image.num_heads, self.image.intermediate_size, self.image.activation, self.image.layer_norm_epsilon
        )
        init = nn.initializers.lecun_normal()
        self.text_projection = layers.Dense(self.image.hidden_size, kernel_init=init)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(self.scale)), (1,), jnp.float32)
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.bias), (1,), jnp.float32)

    def __call__(self, image_BxHxWxC: jax.Array, input_ids_BxT: jax.Array) -> jax.Array:
        """Map images and texts to the logits float32 [B, B] of every image with every text."""
        return self.logits(self.encode_image(image_BxHxWxC), self.encode_text(input_ids_BxT))

    def encode_image(self, image_BxHxWxC: jax.Array) -> jax.Array:
        """Map images float [B, H, W, C] to unit vectors float32 [B, E]."""
        return _unit(self.pool(self.image(image_BxHxWxC).astype(jnp.float32)))

    def encode_text(self, input_ids_BxT: jax.Array) -> jax.Array:
        """Map token ids int32 [B, T] to unit vectors float32 [B, E]."""
        if input_ids_BxT.shape[1] != self.text.max_positions:
            found, needed = input_ids_BxT.shape[1], self.text.max_positions
            raise UserError(f"SigLIP's texts are padded to max_positions={needed}; these have {found} tokens")
        return _unit(self.text_projection(self.text(input_ids_BxT)[:, -1].astype(jnp.float32)))

    def logits(self, images_BxE: jax.Array, texts_CxE: jax.Array, most: float = math.inf) -> jax.Array:
        """Return the scaled and shifted similarities float32 [B, C]; `most` bounds the scale."""
        return jnp.exp(jnp.minimum(self.logit_scale, math.log(most))) * (images_BxE @ texts_CxE.T) + self.logit_bias


class AttentionPool(nn.Module):
    """A learned query that attends to all tokens, and an MLP (Zhai 2022, "Scaling vision transformers", section 3.2).

    Attributes:
      num_heads: H.
      intermediate_size: F.
      activation: of the MLP, by its Hugging Face name.
      layer_norm_epsilon: of the norm before the MLP.
    """

    num_heads: int
    intermediate_size: int
    activation: str
    layer_norm_epsilon: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Map [B, T, D] to [B, D]."""
        init = nn.initializers.xavier_uniform()
        probe_1xD = self.param("probe", init, (1, x_BxTxD.shape[-1]), jnp.float32)
        attention = Attention(self.num_heads, kernel_init=init, name="attention")
        y_Bx1xD = attention(layers.for_each(probe_1xD, len(x_BxTxD)), source_BxSxD=x_BxTxD)
        mlp = layers.MLP(self.intermediate_size, self.activation, kernel_init=init, name="mlp")
        return (y_Bx1xD + mlp(layers.LayerNorm(self.layer_norm_epsilon, name="mlp_norm")(y_Bx1xD)))[:, 0]


def _unit(x_BxE: jax.Array) -> jax.Array:
    """Return vectors of length 1."""
    return x_BxE / jnp.linalg.norm(x_BxE, axis=-1, keepdims=True)
