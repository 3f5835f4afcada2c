"""Masked autoencoders (He 2021) in Hugging Face's format.

Their files hold the tables of positions too, which a model's sizes alone determine here: a file is read only if it
holds just those, and they are written out again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from research.errors import UserError
from research.models import vit
from research.models.mae import MaskedAutoencoder
from research.pretrained import family
from research.pretrained.family import Family, Key, Kind, Layout, Tensor
from research.pretrained.vit import CONSTANTS, MODULES

TOLERANCE = 1e-5  # between sines computed here and there

_IMAGE, _PATCH = Key("image_size", 224), Key("patch_size", 16)
_ENCODER_KEYS = {
    "image_size": _IMAGE,
    "patch_size": _PATCH,
    "num_channels": Key("num_channels", 3),
    "hidden_size": Key("hidden_size", 768),
    "num_layers": Key("num_hidden_layers", 12),
    "num_heads": Key("num_attention_heads", 12),
    "intermediate_size": Key("intermediate_size", 3072),
    "activation": Key("hidden_act", "gelu"),
    "use_bias": Key("qkv_bias", True),
    "layer_norm_epsilon": Key("layer_norm_eps", 1e-12),
    "dropout": Key("hidden_dropout_prob", 0.0, free=True),
    "attention_dropout": Key("attention_probs_dropout_prob", 0.0, free=True),
    "initializer_range": Key("initializer_range", 0.02, free=True),
}
_CONSTANTS = CONSTANTS | {"prefix_tokens": 1, "positions": "sinusoidal"}
_DECODER_KEYS = {
    "decoder_hidden_size": Key("decoder_hidden_size", 512),
    "decoder_num_layers": Key("decoder_num_hidden_layers", 8),
    "decoder_num_heads": Key("decoder_num_attention_heads", 16),
    "decoder_intermediate_size": Key("decoder_intermediate_size", 2048),
    "mask_ratio": Key("mask_ratio", 0.75, free=True),
    "normalize_targets": Key("norm_pix_loss", False, free=True),
}
_TOKEN = Layout(lambda x: [x[0]], lambda x: x[None])
_FLAT_TOKEN = Layout(lambda x: [x[0, 0]], lambda x: x[None, None])


def _blocks(ours: str, theirs: str, part: str = "") -> list[Tensor]:
    """The names of a stack of blocks."""
    return [
        *family.norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before", part),
        *family.linear(f"{ours}/attention/query", f"{theirs}.attention.attention.query", part),
        *family.linear(f"{ours}/attention/key", f"{theirs}.attention.attention.key", part),
        *family.linear(f"{ours}/attention/value", f"{theirs}.attention.attention.value", part),
        *family.linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense", part),
        *family.norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after", part),
        *family.linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense", part),
        *family.linear(f"{ours}/mlp/down", f"{theirs}.output.dense", part),
    ]


def _encoder(ours: str) -> list[Tensor]:
    """The names of an encoder whose parameters' paths begin with `ours`."""
    patches = "vit.embeddings.patch_embeddings.projection"
    return [
        Tensor((f"{ours}prefix",), "vit.embeddings.cls_token", _TOKEN),
        Tensor((f"{ours}patches/kernel",), f"{patches}.weight", family.CONVOLUTION),
        Tensor((f"{ours}patches/bias",), f"{patches}.bias"),
        *_blocks(f"{ours}layers", "vit.encoder.layer.{}"),
        *family.norm(f"{ours}norm", "vit.layernorm"),
    ]


def _positions(name: str, image_size: int, patch_size: int, width: int, part: str = "") -> Tensor:
    """A line about a table that is no parameter of ours: checked where it is read, written as it must be."""

    def table() -> np.ndarray:
        shape = vit.grid((image_size, image_size), patch_size)
        return np.pad(vit.sinusoids_2d(*shape, width), ((1, 0), (0, 0)))[None]

    def check(x: np.ndarray) -> Sequence[np.ndarray]:
        if (most := np.abs(x - table()).max()) > TOLERANCE:
            raise UserError(f"{name} is not the sinusoids of He 2021, but off by {most:.2g}; no other is implemented")
        return []

    return Tensor((), name, Layout(check, table), part)


def _tables(kind: Kind, model: nn.Module) -> list[Tensor]:
    """The lines about the tables of positions in the file of a model."""
    fields = kind.fields(model)
    grid = fields["image_size"], fields["patch_size"]
    tables = [_positions("vit.embeddings.position_embeddings", *grid, fields["hidden_size"])]
    if isinstance(model, MaskedAutoencoder):
        width = fields["decoder_hidden_size"]
        tables.append(_positions("decoder.decoder_pos_embed", *grid, width, part="decoder"))
    return tables


class _MAEFamily(Family):
    """A family whose files hold tables that depend on the model's fields."""

    def kind_of(self, model: nn.Module) -> Kind | None:
        """Return the kind that `model` is of, if any, with the lines about its tables."""
        kind = super().kind_of(model)
        return kind and dataclasses.replace(kind, tensors=[*kind.tensors, *_tables(kind, model)])


def _refuse(fields: Mapping[str, Any]) -> dict[str, Any]:
    raise UserError("Transformers has no ViT-MAE with a classifier")


FAMILY = _MAEFamily(
    prefix="vit.",
    kinds={
        "masked_autoencoder": Kind(
            architecture="ViTMAEForPreTraining",
            model=MaskedAutoencoder,
            parts={"encoder": vit.Encoder},
            keys=_ENCODER_KEYS | _DECODER_KEYS,
            constants=_CONSTANTS,
            tensors=[
                *family.linear("decoder/embed", "decoder.decoder_embed", part="decoder"),
                Tensor(("decoder/mask_token",), "decoder.mask_token", _FLAT_TOKEN, part="decoder"),
                *_blocks("decoder/layers", "decoder.decoder_layers.{}", part="decoder"),
                *family.norm("decoder/norm", "decoder.decoder_norm", part="decoder"),
                *family.linear("decoder/predict", "decoder.decoder_pred", part="decoder"),
            ],
        ),
        "encoder": Kind(
            architecture="ViTMAEModel",
            model=vit.Encoder,
            parts={},
            keys=_ENCODER_KEYS,
            constants=_CONSTANTS,
            more=lambda fields: {"mask_ratio": 0.0},  # ours sees all patches; theirs in an order drawn anew
        ),
        "image_classifier": Kind(
            architecture="ViTMAEModel",
            model=vit.ImageClassifier,
            parts={"encoder": vit.Encoder},
            keys=_ENCODER_KEYS,
            constants=_CONSTANTS,
            more=_refuse,
            tensors=family.linear("head_output", "classifier", part="head"),
        ),
    },
    tensors=[*_encoder("encoder/"), *_encoder("")],
    only={"pruned_heads": {}, "per_layer_config": {}, "quantization_config": {}},
    unused=[r"vit\.embeddings\.position_embeddings", r"decoder\.decoder_pos_embed"],
    modules=MODULES,
)
