"""ViT (Dosovitskiy 2020) in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.models import vit
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor

_ROW = Layout(lambda x: [x[0]], lambda x: x[None])  # [1, ...] of theirs
_TOKEN = Layout(lambda x: [x[0, 0]], lambda x: x[None, None])


def side(name: str, default: int) -> Computed:
    """The side of a square in pixels: of an image, or of a patch."""

    def read(config: Mapping[str, Any]) -> Any:
        value = Key(name, default).read(config)
        sides = set(value) if isinstance(value, list) else {value}
        if len(sides) != 1:
            raise UserError(f"config.json has {name}={value!r}, of which only squares are implemented")
        return sides.pop()

    return Computed(read, lambda value: {name: value})


def encoder_keys(patch_size: int, layer_norm_epsilon: float) -> dict[str, Key | Computed]:
    """The keys of an encoder, but for the size of its MLP, by what Transformers assumes where they are absent."""
    return {
        "image_size": side("image_size", 224),
        "patch_size": side("patch_size", patch_size),
        "num_channels": Key("num_channels", 3),
        "hidden_size": Key("hidden_size", 768),
        "num_layers": Key("num_hidden_layers", 12),
        "num_heads": Key("num_attention_heads", 12),
        "use_bias": Key("qkv_bias", True),
        "layer_norm_epsilon": Key("layer_norm_eps", layer_norm_epsilon),
        "dropout": Key("hidden_dropout_prob", 0.0, free=True),
        "attention_dropout": Key("attention_probs_dropout_prob", 0.0, free=True),
        "initializer_range": Key("initializer_range", 0.02, free=True),
    }


KEYS = encoder_keys(16, 1e-12) | {
    "intermediate_size": Key("intermediate_size", 3072),
    "activation": Key("hidden_act", "gelu"),
}
EMBEDDING = {"positions": "learned", "patch_bias": True, "embedding_norm": False}
CONSTANTS = EMBEDDING | {"gated": False, "layer_scale": None}
ONLY: dict[str, Any] = {"pruned_heads": {}, "per_layer_config": {}, "quantization_config": {}}


def embedding_tensors(prefix: str, tokens: tuple[str, ...]) -> list[Tensor]:
    """The names of what stands before the layers; `tokens` are those before the patches."""
    start, patches = f"{prefix}embeddings.", "encoder/patches"
    return [
        Tensor(("encoder/prefix",), f"{start}{{}}_token", _TOKEN, numbers=tokens),
        Tensor(("encoder/position",), f"{start}position_embeddings", _ROW),
        Tensor((f"{patches}/kernel",), f"{start}patch_embeddings.projection.weight", family.CONVOLUTION),
        Tensor((f"{patches}/bias",), f"{start}patch_embeddings.projection.bias"),
    ]


def attention_tensors(layer: str) -> list[Tensor]:
    """The names of a layer's attention."""
    parts = {"query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "output.dense"}
    lines = (family.linear(f"encoder/layers/attention/{ours}", f"{layer}attention.{parts[ours]}") for ours in parts)
    return [line for lines_of_one in lines for line in lines_of_one]


def encoder_tensors(prefix: str, tokens: tuple[str, ...]) -> list[Tensor]:
    """The names of an encoder, as ViT and DeiT have it."""
    layer = f"{prefix}encoder.layer.{{}}."
    return [
        *embedding_tensors(prefix, tokens),
        *attention_tensors(layer),
        *family.norm("encoder/layers/attention_norm", f"{layer}layernorm_before"),
        *family.linear("encoder/layers/mlp/up", f"{layer}intermediate.dense"),
        *family.linear("encoder/layers/mlp/down", f"{layer}output.dense"),
        *family.norm("encoder/layers/mlp_norm", f"{layer}layernorm_after"),
        *family.norm("encoder/norm", f"{prefix}layernorm"),
    ]


# What Transformers 5 calls modules in memory: see `family.Family.modules`.
ATTENTION_MODULES = (
    *((rf"attention\.attention\.{name}\.", f"attention.{name[0]}_proj.") for name in ("query", "key", "value")),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)
MODULES = (
    *ATTENTION_MODULES,
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(layer\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"encoder\.layer\.", "layers."),
)


def leftovers(prefix: str) -> list[str]:
    """Regular expressions of the names of what comes with an encoder and takes no part in classification."""
    start = prefix.replace(".", r"\.")
    return [rf"{start}pooler\..*", rf"{start}embeddings\.mask_token", r"decoder\..*"]


FAMILY = Family(
    prefix="vit.",
    kinds={
        "image_classifier": Kind(
            architecture="ViTForImageClassification",
            model=vit.ImageClassifier,
            parts={"encoder": vit.Encoder},
            keys=KEYS,
            constants=CONSTANTS | {"prefix_tokens": 1, "pooling": "token"},
            tensors=family.linear("head_output", "classifier", part="head"),
        ),
    },
    tensors=encoder_tensors("vit.", ("cls",)),
    only=ONLY,
    unused=leftovers("vit."),
    modules=MODULES,
)
