"""DETR (Carion 2020): a backbone, a transformer and a set of boxes.

Shape letters beyond those of `layers`: H rows and W columns of pixels, h and w of the backbone's map, S = h w of its
places; Q queries, L layers of the decoder, C classes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.errors import UserError
from research.models import layers
from research.models.attention import Attention
from research.models.blocks import Block, every_output, stack
from research.models.resnet import ResNet, shrink
from research.models.structure import Structure


def sinusoids(mask_BxHxW: jax.Array, width: int) -> jax.Array:
    """Return the positions of places on a map, float32 [B, h, w, width] (Carion 2020; Parmar 2018).

    Half of them for the row, half for the column, both counted over what the mask does not hide and as shares of what
    there is, times 2 pi: sines and cosines in turn.
    """
    if width % 4:
        raise UserError(f"hidden_size {width} must be a multiple of 4")
    mask = mask_BxHxW.astype(jnp.float32)
    frequencies = 10000.0 ** (-jnp.arange(width // 4, dtype=jnp.float32) * 4 / width)

    def waves(axis: int) -> jax.Array:
        counts = jnp.cumsum(mask, axis)
        whole = jax.lax.slice_in_dim(counts, counts.shape[axis] - 1, None, axis=axis)
        angles = (counts / (whole + 1e-6) * 2 * math.pi)[..., None] * frequencies
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*mask.shape, width // 2)

    return jnp.concatenate([waves(1), waves(2)], axis=-1)


class Encoder(nn.Module):
    """Blocks that attend to the whole map; its fields are made by `Detr`."""

    block: Callable[..., nn.Module]
    num_layers: int
    unroll: int | None
    remat: str

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, structure: Structure, position_BxSxD: jax.Array) -> jax.Array:
        """Map [B, S, D] to [B, S, D]; positions are added to the queries and keys of every layer."""
        return stack(
            self.block(name="layers"),
            self.num_layers,
            x_BxSxD,
            structure=structure,
            position_BxTxD=position_BxSxD,
            unroll=self.unroll,
            remat=self.remat,
        )


class Decoder(nn.Module):
    """Blocks that turn queries into objects; its fields are made by `Detr`."""

    block: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    num_layers: int
    unroll: int | None
    remat: str

    @nn.compact
    def __call__(
        self,
        query_QxD: jax.Array,
        source_BxSxD: jax.Array,
        source_structure: Structure,
        source_position_BxSxD: jax.Array,
    ) -> jax.Array:
        """Return the normalised outputs of all layers, [L, B, Q, D].

        What the layers work on begins with zeros; `query_QxD` are its positions.
        """
        shape = (source_BxSxD.shape[0], *query_QxD.shape)
        hidden_LxBxQxD = every_output(
            self.block(name="layers"),
            self.num_layers,
            jnp.zeros(shape, source_BxSxD.dtype),
            position_BxTxD=jnp.broadcast_to(query_QxD, shape),
            source_BxSxD=source_BxSxD,
            source_structure=source_structure,
            source_position_BxSxD=source_position_BxSxD,
            unroll=self.unroll,
            remat=self.remat,
        )
        return self.norm(name="norm")(hidden_LxBxQxD)


class BoxHead(nn.Module):
    """Three linear layers with rectifiers between them, and a sigmoid."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., D] to boxes [..., 4]: centre (x, y), width and height, as shares of the image's."""
        dense = functools.partial(layers.Dense, kernel_init=nn.initializers.xavier_uniform())
        for name in ("hidden1", "hidden2"):
            x = jax.nn.relu(dense(x.shape[-1], name=name)(x))
        return jax.nn.sigmoid(dense(4, name="output")(x))


class Detr(nn.Module):
    """The detector. Its defaults are those of the paper.

    Attributes:
      backbone: maps images and their masks to [B, h, w, channels].
      num_outputs: C; there is one logit more, for "no object".
      num_queries: Q, the objects that can be found in an image.
      hidden_size: D, a multiple of 4 and of the heads.
      num_layers: of the encoder.
      num_decoder_layers: L; as many as the encoder's where it is None.
      num_heads: H.
      num_decoder_heads: of the decoder, where it is another number.
      intermediate_size: F.
      decoder_intermediate_size: of the decoder, where it is another size.
      activation: of the MLPs in the blocks, by its Hugging Face name.
      layer_norm_epsilon: of every norm.
      input_positions: add the map's positions to what enters the encoder too ("sine at input", Carion 2020, table 3).
        Attention copies features without their positions, so that boxes can be placed only as far as features tell
        where they are: those of a deep backbone do, through its padding; those of a shallow one do not.
      dropout: before each residual sum.
      attention_dropout: on the attention weights.
      activation_dropout: on the MLPs' hidden layer.
      dtype: what products are computed in, those of the backbone too; parameters and heads stay float32.
      unroll: layers that the compiler sees at once; None chooses by platform and depth.
      remat: what the backward pass recomputes: see `blocks.REMAT`.
      attention: how attention is computed: see `attention.attend`.
    """

    backbone: ResNet
    num_outputs: int
    num_queries: int = 100
    hidden_size: int = 256
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    num_decoder_heads: int | None = None
    intermediate_size: int = 2048
    decoder_intermediate_size: int | None = None
    activation: str = "relu"
    layer_norm_epsilon: float = 1e-5
    input_positions: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    dtype: str = "float32"
    unroll: int | None = None
    remat: str = "none"
    attention: str = "auto"

    inputs: ClassVar[tuple[str, ...]] = ("image", "pixel_mask")

    def setup(self):
        """Make all but the backbone."""
        dtype, init = jnp.dtype(self.dtype), nn.initializers.xavier_uniform()
        norm = functools.partial(layers.LayerNorm, self.layer_norm_epsilon, dtype=dtype)

        def block(heads: int, width: int) -> Callable[..., nn.Module]:
            attention = functools.partial(
                Attention,
                heads,
                dropout=self.attention_dropout,
                dtype=dtype,
                kernel_init=init,
                implementation=self.attention,
                remat=self.remat,
            )
            mlp = functools.partial(
                layers.MLP, width, self.activation, dropout=self.activation_dropout, dtype=dtype, kernel_init=init
            )
            return functools.partial(Block, attention, mlp, norm, norms="sum", dropout=self.dropout)

        size: dict[str, Any] = {"unroll": self.unroll, "remat": self.remat}
        self.projection = layers.Dense(self.hidden_size, dtype=dtype, kernel_init=init)
        self.encoder = Encoder(block(self.num_heads, self.intermediate_size), self.num_layers, **size)
        self.decoder = Decoder(
            block(
                self.num_decoder_heads or self.num_heads,
                self.decoder_intermediate_size or self.intermediate_size,
            ),
            norm,
            self.num_decoder_layers or self.num_layers,
            **size,
        )
        self.queries = self.param(
            "queries", nn.initializers.normal(1.0), (self.num_queries, self.hidden_size), jnp.float32
        )
        self.class_head = layers.Dense(self.num_outputs + 1, kernel_init=init)
        self.box_head = BoxHead()

    def __call__(
        self, image_BxHxWx3: jax.Array, pixel_mask_BxHxW: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Find objects; every layer of the decoder does, the last one best.

        Args:
          image_BxHxWx3: images, float; smaller ones have padding of 0 at the bottom and right.
          pixel_mask_BxHxW: 1 at what is no padding; None where there is none.

        Returns:
          logits float32 [L, B, Q, C + 1], the last of which is that of "no object", and boxes float32 [L, B, Q, 4], as
          shares of the image without its padding.
        """
        map_BxhxwxE = self.backbone(image_BxHxWx3.astype(self.dtype), pixel_mask_BxHxW)
        batch, height, width, _ = map_BxhxwxE.shape
        mask_Bxhxw = shrink(pixel_mask_BxHxW, (height, width))
        mask_Bxhxw = jnp.ones((batch, height, width)) if mask_Bxhxw is None else mask_Bxhxw
        position_BxSxD = sinusoids(mask_Bxhxw, self.hidden_size).reshape(batch, height * width, self.hidden_size)
        places_BxS = (mask_Bxhxw.reshape(batch, height * width) != 0).astype(jnp.int32)

        def to_places(count: int) -> Structure:
            return Structure(jnp.ones((batch, count), jnp.int32), places_BxS, packed=True)

        x_BxSxD = self.projection(map_BxhxwxE.reshape(batch, height * width, -1))
        if self.input_positions:
            x_BxSxD += position_BxSxD.astype(x_BxSxD.dtype)
        x_BxSxD = self.encoder(x_BxSxD, to_places(height * width), position_BxSxD)
        source_structure = to_places(self.num_queries)
        hidden_LxBxQxD = self.decoder(self.queries, x_BxSxD, source_structure, position_BxSxD).astype(jnp.float32)
        # Examples first: linear layers flatten all but the last axis, and only the first can stay split over devices.
        hidden_BxLxQxD = hidden_LxBxQxD.swapaxes(0, 1)
        return self.class_head(hidden_BxLxQxD).swapaxes(0, 1), self.box_head(hidden_BxLxQxD).swapaxes(0, 1)
