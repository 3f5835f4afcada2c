"""ModernBERT (Warner 2024) in Hugging Face's format."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import UserError
from research.models import modernbert
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor

_LAYERS = Key("num_hidden_layers", 22)
_EVERY = Key("global_attn_every_n_layers", 3)
_LATER = tuple(map(str, range(1, 200)))  # what stands for the layers after the first
_THIRDS = Layout(lambda x: [part.T for part in np.split(x, 3)], lambda *ours: np.concatenate([x.T for x in ours]))
_HALVES = Layout(lambda x: [part.T for part in np.split(x, 2)], lambda *ours: np.concatenate([x.T for x in ours]))


def _types(every: int, count: int) -> list[str]:
    return ["sliding_attention" if i % every else "full_attention" for i in range(count)]


def _global_every(config: Mapping[str, Any]) -> Any:
    """Return of how many layers one attends to all tokens: Transformers 5 lists the layers, 4 says the number."""
    types, count = config.get("layer_types"), _LAYERS.read(config)
    if types is None or types == _types(_EVERY.read(config), count):
        return _EVERY.read(config)
    found = next((every for every in range(1, count + 1) if types == _types(every, count)), None)
    if found is None:
        raise UserError(f"config.json has layer_types={types}, of which only every n-th may be of full_attention")
    return found


def _theta(kind: str, old: str, default: float) -> Computed:
    """The base of the wavelengths: Transformers 5 keeps it by the kind of layer, 4 under a key of its own."""

    def read(config: Mapping[str, Any]) -> Any:
        own = (config.get("rope_parameters") or {}).get(kind) or {}
        if own.get("rope_type", "default") != "default":
            raise UserError(f"config.json has rope_type '{own['rope_type']}', of which only 'default' is implemented")
        theta = own.get("rope_theta", config.get(old, default))
        return float(config.get("global_rope_theta", 160000.0) if theta is None else theta)

    return Computed(read, lambda value: {old: value})


_KEYS: dict[str, Key | Computed] = {
    "vocab_size": Key("vocab_size", 50368),
    "hidden_size": Key("hidden_size", 768),
    "num_layers": _LAYERS,
    "num_heads": Key("num_attention_heads", 12),
    "intermediate_size": Key("intermediate_size", 1152),
    "max_positions": Key("max_position_embeddings", 8192),
    "global_every": Computed(_global_every, _EVERY.write),
    "local_window": Key("local_attention", 128),
    "global_theta": _theta("full_attention", "global_rope_theta", 160000.0),
    "local_theta": _theta("sliding_attention", "local_rope_theta", 10000.0),
    "activation": Key("hidden_activation", "gelu"),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
    "norm_bias": Key("norm_bias", False),
    "attention_bias": Key("attention_bias", False),
    "mlp_bias": Key("mlp_bias", False),
    "head_activation": Key("classifier_activation", "gelu"),
    "dropout": Key("embedding_dropout", 0.0, free=True),
    "attention_dropout": Key("attention_dropout", 0.0, free=True),
    "mlp_dropout": Key("mlp_dropout", 0.0, free=True),
    "initializer_range": Key("initializer_range", 0.02, free=True),
}


def _block(ours: str, theirs: str) -> list[Tensor]:
    parts = ("query", "key", "value")
    lines = [
        Tensor(tuple(f"{ours}/attention/{part}/kernel" for part in parts), f"{theirs}.attn.Wqkv.weight", _THIRDS),
        Tensor(tuple(f"{ours}/attention/{part}/bias" for part in parts), f"{theirs}.attn.Wqkv.bias", _THIRDS),
        *family.linear(f"{ours}/attention/out", f"{theirs}.attn.Wo"),
        *family.norm(f"{ours}/attention_norm", f"{theirs}.attn_norm"),
        *family.norm(f"{ours}/mlp_norm", f"{theirs}.mlp_norm"),
        Tensor(tuple(f"{ours}/mlp/{part}/kernel" for part in ("gate", "up")), f"{theirs}.mlp.Wi.weight", _HALVES),
        Tensor(tuple(f"{ours}/mlp/{part}/bias" for part in ("gate", "up")), f"{theirs}.mlp.Wi.bias", _HALVES),
        *family.linear(f"{ours}/mlp/down", f"{theirs}.mlp.Wo"),
    ]
    numbers = _LATER if "{}" in theirs else ()
    return [dataclasses.replace(line, numbers=numbers) for line in lines]


def _head(part: str) -> list[Tensor]:
    """The names of the first layer of both heads."""
    return [
        Tensor(("head_dense/kernel",), "head.dense.weight", family.TRANSPOSED, part),
        *family.norm("head_norm", "head.norm", part=part),
    ]


_OWN = "head_output/kernel"
# Transformers assumes those of the published vocabulary where a key is absent.
_NO_IDS = dict.fromkeys([f"{role}_token_id" for role in ("pad", "bos", "eos", "cls", "sep")])

FAMILY = Family(
    prefix="model.",
    kinds={
        "masked_lm": Kind(
            architecture="ModernBertForMaskedLM",
            model=modernbert.MaskedLM,
            parts={"encoder": modernbert.Encoder},
            keys=_KEYS | {"tie_embeddings": Key("tie_word_embeddings", True)},
            constants={},
            defaults=_NO_IDS,
            tensors=[
                *_head("head"),
                Tensor(("head_bias",), "decoder.bias", part="head"),
                Tensor((_OWN,), "decoder.weight", family.TRANSPOSED, part="head"),
            ],
        ),
        "sequence_classifier": Kind(
            architecture="ModernBertForSequenceClassification",
            model=modernbert.SequenceClassifier,
            parts={"encoder": modernbert.Encoder},
            keys=_KEYS
            | {
                "pooling": Key("classifier_pooling", "cls"),
                "head_dropout": Key("classifier_dropout", 0.0, free=True),
            },
            constants={},
            defaults=_NO_IDS,
            tensors=[*_head("pooler"), *family.linear("head_output", "classifier", part="head")],
        ),
    },
    tensors=[
        *family.embedding("encoder/word", "model.embeddings.tok_embeddings"),
        *family.norm("encoder/norm_in", "model.embeddings.norm"),
        *_block("encoder/first", "model.layers.0"),
        *_block("encoder/layers", "model.layers.{}"),
        *family.norm("encoder/norm_out", "model.final_norm"),
    ],
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    only={"decoder_bias": True, "classifier_bias": False, "rope_scaling": {}, "quantization_config": {}},
    unused=[],
)
