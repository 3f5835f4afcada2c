"""Qwen2 (Yang 2024) in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.models import gpt
from research.pretrained.family import Computed, Family, Key, Kind
from research.pretrained.gpt2 import complete
from research.pretrained.llama import CONSTANTS, COPIES, HEADS, KEYS, ONLY, UNUSED, tensors


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return how far attention reaches, which must be the same in all layers; None for as far as it goes."""
    window, layers = config.get("sliding_window", 4096), KEYS["num_layers"].read(config)
    if not config.get("use_sliding_window", False):
        window = None
    full = layers if window is None else min(config.get("max_window_layers", 28), layers)
    kinds = config.get("layer_types") or full * ["full_attention"] + (layers - full) * ["sliding_attention"]
    if len(set(kinds)) > 1:
        raise UserError(
            f"config.json has full attention in {kinds.count('full_attention')} of {layers} layers and a "
            "sliding window in the others, of which only one kind in all layers is implemented"
        )
    return window if kinds[0] == "sliding_attention" else None


def _write_window(window: int | None) -> dict[str, Any]:
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return {"use_sliding_window": False, "sliding_window": None} if window is None else sliding


QWEN_KEYS = KEYS | {
    "vocab_size": Key("vocab_size", 151936),
    "num_kv_heads": Computed(
        lambda config: config.get("num_key_value_heads", 32) or HEADS.read(config),
        lambda value: {"num_key_value_heads": value},
    ),
    "intermediate_size": Key("intermediate_size", 22016),
    "max_positions": Key("max_position_embeddings", 32768, free=True),
    "sliding_window": Computed(sliding_window, _write_window),
}
QWEN_CONSTANTS = {name: value for name, value in CONSTANTS.items() if name != "sliding_window"}

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
        )
    },
    tensors=tensors(),
    only=ONLY,
    unused=UNUSED,
    copies=COPIES,
)
