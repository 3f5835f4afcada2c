"""DINOv2 (Oquab 2023) in Hugging Face's format; `onnx.py` reads its encoder from ONNX files too."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.models import vit
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor
from research.pretrained.vit import (
    ATTENTION_MODULES,
    EMBEDDING,
    ONLY,
    attention_tensors,
    embedding_tensors,
    encoder_keys,
)

_LAYER = "dinov2.encoder.layer.{}."
_GATED = Key("use_swiglu_ffn", False)


def _mlp_size(ratio: float, hidden: int, gated: bool) -> int:
    """Return an MLP's width; a gated one has two thirds of a plain one's, rounded up to a multiple of 8."""
    size = int(hidden * ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated else size


def _intermediate_size(config: Mapping[str, Any]) -> int:
    return _mlp_size(Key("mlp_ratio", 4).read(config), Key("hidden_size", 768).read(config), _GATED.read(config))


def _activation(config: Mapping[str, Any]) -> str:
    return "silu" if _GATED.read(config) else Key("hidden_act", "gelu").read(config)


def _more(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the MLP's ratio, which Transformers wants whole, and that there is no token for masked patches."""
    ratio = fields["intermediate_size"] / fields["hidden_size"] * (1.5 if fields["gated"] else 1)
    return {"mlp_ratio": round(ratio), "use_mask_token": False}


def _mlp_tensors() -> list[Tensor]:
    """The names of a layer's MLP: a plain one's, and a gated one's, which keeps gate and values in one matrix."""
    names, mlp = f"{_LAYER}mlp.", "encoder/layers/mlp/"
    halves = Layout(lambda x: [half.T for half in np.split(x, 2)], lambda *both: np.concatenate([x.T for x in both]))
    plain = [*family.linear(f"{mlp}up", f"{names}fc1"), *family.linear(f"{mlp}down", f"{names}fc2")]
    gated = [
        Tensor((f"{mlp}gate/kernel", f"{mlp}up/kernel"), f"{names}weights_in.weight", halves),
        Tensor((f"{mlp}gate/bias", f"{mlp}up/bias"), f"{names}weights_in.bias", halves),
        *family.linear(f"{mlp}down", f"{names}weights_out"),
    ]
    gate = f"{mlp}gate/kernel"
    return [
        *(dataclasses.replace(line, unless=gate) for line in plain),
        *(dataclasses.replace(line, beside=gate) for line in gated),
    ]


FAMILY = Family(
    prefix="dinov2.",
    kinds={
        "image_classifier": Kind(
            architecture="Dinov2ForImageClassification",
            model=vit.ImageClassifier,
            parts={"encoder": vit.Encoder},
            keys=encoder_keys(14, 1e-6)
            | {
                "gated": _GATED,
                "intermediate_size": Computed(_intermediate_size),
                "activation": Computed(_activation, lambda value: {"hidden_act": value}),
                "layer_scale": Key("layerscale_value", 1.0, free=True),
                "drop_path": Key("drop_path_rate", 0.0, free=True),
            },
            constants=EMBEDDING | {"prefix_tokens": 1, "pooling": "token_and_mean"},
            more=_more,
            tensors=family.linear("head_output", "classifier", part="head"),
        ),
    },
    tensors=[
        *embedding_tensors("dinov2.", ("cls",)),
        *attention_tensors(_LAYER),
        *family.norm("encoder/layers/attention_norm", f"{_LAYER}norm1"),
        *family.norm("encoder/layers/mlp_norm", f"{_LAYER}norm2"),
        *family.norm("encoder/norm", "dinov2.layernorm"),
        Tensor(("encoder/layers/attention_scale",), f"{_LAYER}layer_scale1.lambda1"),
        Tensor(("encoder/layers/mlp_scale",), f"{_LAYER}layer_scale2.lambda1"),
        *_mlp_tensors(),
    ],
    only=ONLY,
    unused=[r"dinov2\.embeddings\.mask_token"],
    modules=ATTENTION_MODULES,
)
