"""Marian's translation models (Junczys-Dowmunt 2018; Tiedemann 2020), which are Vaswani's, in Hugging Face's format."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import UserError
from research.models.encoder_decoder import EncoderDecoder
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor

_HIDDEN = Key("d_model", 1024)


def _both_sides(name: str, default: int) -> Computed:
    """A size that both sides have in common, as our model has it once."""

    def read(config: Mapping[str, Any]) -> Any:
        encoder, decoder = (Key(f"{side}_{name}", default).read(config) for side in ("encoder", "decoder"))
        if encoder != decoder:
            raise UserError(f"config.json has decoder_{name}={decoder}, of which only the encoder's {encoder} will do")
        return encoder

    return Computed(read, lambda value: {f"encoder_{name}": value, f"decoder_{name}": value})


def _vocab_size(config: Mapping[str, Any]) -> Any:
    size = Key("vocab_size", 58101).read(config)
    if config.get("decoder_vocab_size") not in (None, size):
        other = config["decoder_vocab_size"]
        raise UserError(f"config.json has decoder_vocab_size={other}, of which only vocab_size {size} is implemented")
    return size


def _embedding_scale(config: Mapping[str, Any]) -> float:
    return math.sqrt(_HIDDEN.read(config)) if config.get("scale_embedding") else 1.0


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with those written out that `EncoderDecoder` derives where they are None."""
    width, heads, layers = fields["hidden_size"], fields["num_heads"], fields["num_layers"]
    return fields | {
        "num_decoder_layers": layers if fields["num_decoder_layers"] is None else fields["num_decoder_layers"],
        "head_width": None if fields["head_width"] == width / heads else fields["head_width"],
        "embedding_scale": math.sqrt(width) if fields["embedding_scale"] is None else fields["embedding_scale"],
    }


def _attention(ours: str, theirs: str) -> list[Tensor]:
    return [
        tensor
        for name, other in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}.items()
        for tensor in family.linear(f"{ours}/{name}", f"{theirs}.{other}")
    ]


def _side(side: str) -> list[Tensor]:
    """The names of the encoder's or the decoder's parameters."""
    ours, theirs = f"{side}/layers", f"model.{side}.layers.{{}}."
    cross = [
        *_attention(f"{ours}/cross_attention", f"{theirs}encoder_attn"),
        *family.norm(f"{ours}/cross_attention_norm", f"{theirs}encoder_attn_layer_norm"),
    ]
    return [
        *_attention(f"{ours}/attention", f"{theirs}self_attn"),
        *family.norm(f"{ours}/attention_norm", f"{theirs}self_attn_layer_norm"),
        *(cross if side == "decoder" else []),
        *family.linear(f"{ours}/mlp/up", f"{theirs}fc1"),
        *family.linear(f"{ours}/mlp/down", f"{theirs}fc2"),
        *family.norm(f"{ours}/mlp_norm", f"{theirs}final_layer_norm"),
    ]


# Transformers always has a bias of the logits and takes one that is absent for zeros; the key "logits_bias" is ours.
KEYS: dict[str, Key | Computed] = {
    "hidden_size": _HIDDEN,
    "num_layers": Key("encoder_layers", 12),
    "num_decoder_layers": Key("decoder_layers", 12),
    "num_heads": _both_sides("attention_heads", 16),
    "intermediate_size": _both_sides("ffn_dim", 4096),
    "activation": Key("activation_function", "gelu"),
    "embedding_scale": Computed(_embedding_scale, lambda value: {"scale_embedding": value != 1.0}),
    "logits_bias": Key("logits_bias", True),
    "dropout": Key("dropout", 0.1, free=True),
    "attention_dropout": Key("attention_dropout", 0.0, free=True),
    "activation_dropout": Key("activation_dropout", 0.0, free=True),
}
CONSTANTS = {
    "head_width": None,
    "norm": "layer",
    "norm_first": False,
    "norm_epsilon": 1e-5,
    "gated": False,
    "use_bias": True,
    "tie_embeddings": True,
    "logits_scale": 1.0,
}
TENSORS = [
    *family.embedding("word", "model.shared"),
    *_side("encoder"),
    *_side("decoder"),
    Tensor(("head_bias",), "final_logits_bias", Layout(lambda x: [x[0]], lambda x: x[np.newaxis]), part="bias"),
]
COPIES = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
    "lm_head.weight": "model.shared.weight",
}
ONLY = {
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
    "is_decoder": False,
    "normalize_before": False,
    "add_final_layer_norm": False,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "quantization_config": {},
}

FAMILY = Family(
    prefix="model.",
    kinds={
        "encoder_decoder": Kind(
            architecture="MarianMTModel",
            model=EncoderDecoder,
            parts={},
            keys=KEYS
            | {"vocab_size": Computed(_vocab_size, lambda value: {"vocab_size": value, "decoder_vocab_size": value})},
            constants=CONSTANTS | {"positions": "sinusoidal", "embedding_norm": False},
            complete=complete,
            more=lambda fields: {
                "is_encoder_decoder": True,
                "share_encoder_decoder_embeddings": True,
                "tie_word_embeddings": True,
            },
            defaults={
                "pad_token_id": 0,
                "decoder_start_token_id": 0,
                "eos_token_id": None,
                "bos_token_id": None,
                "forced_eos_token_id": None,
                "max_position_embeddings": 1024,  # sinusoids have no end, but theirs are a table
            },
        )
    },
    tensors=TENSORS,
    copies=COPIES,
    only=ONLY
    | {"share_encoder_decoder_embeddings": True, "normalize_embedding": False, "static_position_embeddings": True},
    unused=[r"model\.(encoder|decoder)\.embed_(tokens|positions)\.weight", r"lm_head\.weight"],
)
