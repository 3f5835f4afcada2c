"""The first Gemma (Gemma Team 2024) in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import UserError
from research.models import gpt
from research.pretrained.family import Computed, Family, Key, Kind, Layout
from research.pretrained.gpt2 import complete
from research.pretrained.llama import BIASES, CONSTANTS, COPIES, KEYS, ONLY, UNUSED, tensors

HIDDEN = Key("hidden_size", 3072)
# Norms multiply by 1 + what the file holds.
ABOVE_ONE = Layout(lambda x: [np.asarray(x, np.float32) + 1], lambda x: x - 1)


def activation(config: Mapping[str, Any]) -> str:
    """Return the gate's activation: the first files say "gelu" and mean its approximation by tanh."""
    named = [config[key] for key in ("hidden_act", "hidden_activation") if config.get(key)] or ["gelu"]
    meant = ["gelu_pytorch_tanh" if name == "gelu" else name for name in named]
    if len(set(meant)) > 1:
        raise UserError(f"config.json has hidden_act='{named[0]}' and hidden_activation='{named[1]}'")
    return meant[0]


def embedding_scale(config: Mapping[str, Any]) -> float:
    """Return what word embeddings are multiplied by."""
    return float(HIDDEN.read(config)) ** 0.5


FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="GemmaForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=KEYS
            | BIASES
            | {
                "vocab_size": Key("vocab_size", 256000),
                "hidden_size": HIDDEN,
                "num_layers": Key("num_hidden_layers", 28),
                "num_heads": Key("num_attention_heads", 16),
                "num_kv_heads": Key("num_key_value_heads", 16),
                "head_width": Key("head_dim", 256),
                "intermediate_size": Key("intermediate_size", 24576),
                "max_positions": Key("max_position_embeddings", 8192, free=True),
                "activation": Computed(activation, lambda value: {"hidden_act": value, "hidden_activation": value}),
                "tie_embeddings": Key("tie_word_embeddings", True),
                "embedding_scale": Computed(embedding_scale),
            },
            constants={name: value for name, value in CONSTANTS.items() if name != "embedding_scale"},
            complete=complete,
        )
    },
    tensors=tensors(norm=ABOVE_ONE),
    only=ONLY | {"use_bidirectional_attention": False},
    unused=UNUSED,
    copies=COPIES,
)
