"""Mistral (Jiang 2023) in Hugging Face's format."""

from research.models import gpt
from research.pretrained.family import Computed, Family, Key, Kind
from research.pretrained.gpt2 import complete
from research.pretrained.llama import CONSTANTS, COPIES, HEADS, KEYS, ONLY, UNUSED, tensors

FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="MistralForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=KEYS
            | {
                "num_kv_heads": Computed(
                    lambda config: config.get("num_key_value_heads", 8) or HEADS.read(config),
                    lambda value: {"num_key_value_heads": value},
                ),
                "intermediate_size": Key("intermediate_size", 14336),
                "max_positions": Key("max_position_embeddings", 4096 * 32, free=True),
                "sliding_window": Computed(
                    lambda config: config.get("sliding_window", 4096), lambda value: {"sliding_window": value}
                ),
            },
            constants={name: value for name, value in CONSTANTS.items() if name != "sliding_window"}
            | {"attention_bias": False, "out_bias": False},
            complete=complete,
        )
    },
    tensors=tensors(),
    only=ONLY | {"layer_types": None},
    unused=UNUSED,
    copies=COPIES,
)
