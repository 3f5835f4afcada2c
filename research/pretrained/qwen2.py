"""Qwen2 (Yang 2024) in Hugging Face's format."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.models import gpt
from research.pretrained.family import Computed, Family, Key, Kind
from research.pretrained.gpt2 import complete
from research.pretrained.llama import (
    CONSTANTS,
    COPIES,
    HEADS,
    KEYS,
    ONLY,
    UNUSED,
    layer_types,
    local_layers,
    tensors,
    write_layers,
)


def _kinds(config: Mapping[str, Any]) -> Sequence[str]:
    layers = KEYS["num_layers"].read(config)
    sliding = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    full = min(config.get("max_window_layers", 28), layers) if sliding else layers
    return layer_types(config, full * ["full_attention"] + (layers - full) * ["sliding_attention"])


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return how far attention reaches in the layers that keep to a window; None where none does."""
    used = config.get("use_sliding_window", False) and "sliding_attention" in _kinds(config)
    return config.get("sliding_window", 4096) if used else None


def _local_layers(config: Mapping[str, Any]) -> tuple[bool, ...] | None:
    return None if sliding_window(config) is None else local_layers(_kinds(config))


def _write_window(window: int | None) -> dict[str, Any]:
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return {"use_sliding_window": False, "sliding_window": None} if window is None else sliding


def write_mixed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of Transformers 5 for layers that differ, and that of Transformers 4 where it can say the same."""
    local = fields["local_layers"]
    if local is None:
        return {}
    full = len(local) - sum(local)
    return write_layers(fields) | ({} if any(local[:full]) else {"max_window_layers": full})


QWEN_KEYS = KEYS | {
    "vocab_size": Key("vocab_size", 151936),
    "num_kv_heads": Computed(
        lambda config: config.get("num_key_value_heads", 32) or HEADS.read(config),
        lambda value: {"num_key_value_heads": value},
    ),
    "intermediate_size": Key("intermediate_size", 22016),
    "max_positions": Key("max_position_embeddings", 32768, free=True),
    "sliding_window": Computed(sliding_window, _write_window),
    "local_layers": Computed(_local_layers),
}
QWEN_CONSTANTS = {name: value for name, value in CONSTANTS.items() if name not in QWEN_KEYS}

FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="Qwen2ForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=QWEN_KEYS,
            constants=QWEN_CONSTANTS | {"attention_bias": True, "out_bias": False},
            complete=complete,
            more=write_mixed,
        )
    },
    tensors=tensors(),
    only=ONLY,
    unused=UNUSED,
    copies=COPIES,
)
