"""CLIP (Radford 2021) in Hugging Face's format: two towers, each with a section of config.json of its own."""

import math
from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.models import vit
from research.models.clip import Clip, TextEncoder
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor
from research.pretrained.vit import side

Keys = Mapping[str, Key | Computed]

_ROW = Layout(lambda x: [x[None]], lambda x: x[0])  # [D] of theirs
ONLY: dict[str, Any] = {"quantization_config": {}}


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tower's section; old files have a second one, which counts."""
    return {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}


def scoped(prefix: str, name: str, keys: Keys) -> dict[str, Computed]:
    """Return keys of a tower's section as those of the whole; `write_section` writes them."""

    def read(key: Key | Computed) -> Computed:
        return Computed(lambda config: key.read(section(config, name)), free=key.free)

    return {f"{prefix}_{field}": read(key) for field, key in keys.items()}


def write_section(prefix: str, keys: Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's section of config.json."""
    written: dict[str, Any] = {}
    for field, key in keys.items():
        written |= key.write(fields[f"{prefix}_{field}"])
    return written


def tower_keys(hidden_size: int, heads: int, epsilon: float, activation: str) -> dict[str, Key | Computed]:
    """The keys that both towers have, by what Transformers assumes where they are absent."""
    return {
        "hidden_size": Key("hidden_size", hidden_size),
        "num_layers": Key("num_hidden_layers", 12),
        "num_heads": Key("num_attention_heads", heads),
        "intermediate_size": Key("intermediate_size", 4 * hidden_size),
        "activation": Key("hidden_act", activation),
        "layer_norm_epsilon": Key("layer_norm_eps", epsilon),
        "attention_dropout": Key("attention_dropout", 0.0, free=True),
    }


def image_keys(patch_size: int, heads: int, epsilon: float, activation: str) -> dict[str, Key | Computed]:
    """The keys of the encoder of images."""
    return tower_keys(768, heads, epsilon, activation) | {
        "image_size": side("image_size", 224),
        "patch_size": side("patch_size", patch_size),
        "num_channels": Key("num_channels", 3),
    }


def _layers(ours: str, theirs: str) -> list[Tensor]:
    layer = f"{theirs}.encoder.layers.{{}}."
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    attention = (family.linear(f"{ours}/attention/{us}", f"{layer}self_attn.{them}") for us, them in names.items())
    return [
        *(line for lines in attention for line in lines),
        *family.norm(f"{ours}/attention_norm", f"{layer}layer_norm1"),
        *family.linear(f"{ours}/mlp/up", f"{layer}mlp.fc1"),
        *family.linear(f"{ours}/mlp/down", f"{layer}mlp.fc2"),
        *family.norm(f"{ours}/mlp_norm", f"{layer}layer_norm2"),
    ]


# The names of both towers, as CLIP and SigLIP have them.
TOWERS = [
    Tensor(("image/patches/kernel",), "vision_model.embeddings.patch_embedding.weight", family.CONVOLUTION),
    Tensor(("image/position",), "vision_model.embeddings.position_embedding.weight"),
    *_layers("image/layers", "vision_model"),
    *family.norm("image/norm", "vision_model.post_layernorm"),
    *family.embedding("text/word", "text_model.embeddings.token_embedding"),
    *family.embedding("text/position", "text_model.embeddings.position_embedding"),
    *_layers("text/layers", "text_model"),
    *family.norm("text/norm", "text_model.final_layer_norm"),
]
UNUSED = [r"(vision|text)_model\.embeddings\.position_ids"]


def _end_id(config: Mapping[str, Any]) -> Any:
    """Return the end token; files from before it was recorded right say 2 and mean the highest id."""
    found = Key("eos_token_id", 49407).read(config)
    return Key("vocab_size", 49408).read(config) - 1 if found == 2 else found


_IMAGE = image_keys(32, 12, 1e-5, "quick_gelu")
_TEXT = tower_keys(512, 8, 1e-5, "quick_gelu") | {
    "vocab_size": Key("vocab_size", 49408),
    "max_positions": Key("max_position_embeddings", 77),
}
_END = Computed(lambda config: _end_id(section(config, "text_config")))


def _more(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["end_id"] == 2:
        raise UserError(
            "CLIPModel takes an end_id of 2 for the highest id, as old files mean it; use another tokenizer"
        )
    width = {"projection_dim": fields["projection_size"]}
    text = write_section("text", _TEXT, fields) | {"eos_token_id": fields["end_id"]}
    return {"vision_config": write_section("image", _IMAGE, fields) | width, "text_config": text | width}


FAMILY = Family(
    prefix="",
    kinds={
        "dual_encoder": Kind(
            architecture="CLIPModel",
            model=Clip,
            parts={"image": vit.Encoder, "text": TextEncoder},
            scoped=True,
            keys=scoped("image", "vision_config", _IMAGE)
            | scoped("text", "text_config", _TEXT)
            | {
                "projection_size": Key("projection_dim", 512),
                "end_id": _END,
                "scale": Computed(
                    lambda config: math.exp(Key("logit_scale_init_value", 2.6592).read(config)),
                    lambda value: {"logit_scale_init_value": math.log(value)},
                    free=True,
                ),
            },
            constants={
                "image_prefix_tokens": 1,
                "image_positions": "learned",
                "image_patch_bias": False,
                "image_embedding_norm": True,
                "image_use_bias": True,
                "image_gated": False,
                "image_layer_scale": None,
                "text_causal": True,
            },
            more=_more,
        )
    },
    tensors=[
        *TOWERS,
        Tensor(("image/prefix",), "vision_model.embeddings.class_embedding", _ROW),
        *family.norm("image/norm_in", "vision_model.pre_layrnorm"),
        Tensor(("image_projection/kernel",), "visual_projection.weight", family.TRANSPOSED),
        Tensor(("text_projection/kernel",), "text_projection.weight", family.TRANSPOSED),
        Tensor(("logit_scale",), "logit_scale"),
    ],
    only=ONLY,
    unused=UNUSED,
)
