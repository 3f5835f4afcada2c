"""Gemma 2 (Gemma Team 2024) in Hugging Face's format."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.models import gpt
from research.pretrained.family import Computed, Family, Key, Kind
from research.pretrained.gemma import ABOVE_ONE
from research.pretrained.gpt2 import complete
from research.pretrained.llama import (
    AROUND,
    BIASES,
    CONSTANTS,
    COPIES,
    KEYS,
    ONLY,
    UNUSED,
    layer_types,
    local_layers,
    tensors,
    write_layers,
)

HIDDEN = Key("hidden_size", 2304)


def window(kinds: Sequence[str], config: Mapping[str, Any]) -> int | None:
    """Return how far attention reaches in the layers of the kind "sliding_attention"; None where there is none."""
    return config.get("sliding_window", 4096) if "sliding_attention" in kinds else None


def cap(name: str, default: float | None) -> Computed:
    """A soft cap of scores or logits; null leaves them."""

    def read(config: Mapping[str, Any]) -> float | None:
        value = config.get(name, default)
        return None if value is None else float(value)

    return Computed(read, lambda value: {name: value})


def complete_gemma(fields: dict[str, Any]) -> dict[str, Any]:
    """Return what `complete` does, with the scale of queries written out."""
    fields = complete(fields)
    return fields | {"query_scale": fields["query_scale"] or float(fields["head_width"])}


def _kinds(config: Mapping[str, Any]) -> Sequence[str]:
    layers = KEYS_OF_GEMMAS["num_layers"].read(config)
    return layer_types(config, [("sliding_attention", "full_attention")[i % 2] for i in range(layers)])


KEYS_OF_GEMMAS = (
    KEYS
    | BIASES
    | {
        "vocab_size": Key("vocab_size", 256000),
        "hidden_size": HIDDEN,
        "num_layers": Key("num_hidden_layers", 26),
        "num_heads": Key("num_attention_heads", 8),
        "num_kv_heads": Key("num_key_value_heads", 4),
        "head_width": Key("head_dim", 256),
        "intermediate_size": Key("intermediate_size", 9216),
        "max_positions": Key("max_position_embeddings", 8192, free=True),
        "activation": Computed(
            lambda config: config.get("hidden_activation") or "gelu_pytorch_tanh",
            lambda value: {"hidden_act": value, "hidden_activation": value},
        ),
        "tie_embeddings": Key("tie_word_embeddings", True),
        "embedding_scale": Computed(lambda config: float(HIDDEN.read(config)) ** 0.5),
        "query_scale": Computed(
            lambda config: float(config.get("query_pre_attn_scalar", 256)),
            lambda value: {"query_pre_attn_scalar": int(value)},
        ),
        "attention_softcap": cap("attn_logit_softcapping", 50.0),
        "logits_softcap": cap("final_logit_softcapping", 30.0),
        "sliding_window": Computed(
            lambda config: window(_kinds(config), config), lambda value: {"sliding_window": value}
        ),
        "local_layers": Computed(lambda config: local_layers(_kinds(config))),
    }
)

FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="Gemma2ForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=KEYS_OF_GEMMAS,
            constants={name: value for name, value in CONSTANTS.items() if name not in KEYS_OF_GEMMAS}
            | {"norms": "around"},
            complete=complete_gemma,
            more=write_layers,
        )
    },
    tensors=tensors(ABOVE_ONE, AROUND),
    only=ONLY | {"use_bidirectional_attention": False},
    unused=UNUSED,
    copies=COPIES,
)
