"""Gemma 3 (Gemma Team 2025) in Hugging Face's format; of models of text and images the part for text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.models import gpt
from research.models.positions import SCALINGS
from research.pretrained.family import Computed, Family, Key, Kind
from research.pretrained.gemma import ABOVE_ONE
from research.pretrained.gemma2 import KEYS_OF_GEMMAS, cap, complete_gemma, window
from research.pretrained.llama import (
    AROUND,
    CONSTANTS,
    COPIES,
    ONLY,
    UNUSED,
    layer_types,
    local_layers,
    rope_parameters,
    scaling,
    tensors,
    write_layers,
    write_scaling,
)


def _kinds(config: Mapping[str, Any]) -> Sequence[str]:
    layers, every = KEYS_OF_GEMMAS["num_layers"].read(config), config.get("sliding_window_pattern", 6)
    return layer_types(
        config, ["full_attention" if i % every == 0 else "sliding_attention" for i in range(1, layers + 1)]
    )


def _parameters(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return what config.json says of the rotary positions of layers of that kind.

    Transformers 4 keeps those of full attention where other families have theirs, and of the others only a base.
    """
    held = rope_parameters(config)
    if held.keys() & {"full_attention", "sliding_attention"}:
        return held.get(kind) or {}
    return held if kind == "full_attention" else {}


def _theta(config: Mapping[str, Any], kind: str, key: str, default: float) -> float:
    for value in (_parameters(config, kind).get("rope_theta"), config.get(key)):
        if value is not None:
            return float(value)
    return default


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if _parameters(config, "sliding_attention").get("rope_type", "default") != "default":
        raise UserError("config.json stretches the rotary positions of sliding_attention, which is not implemented")
    return scaling(config, _parameters(config, "full_attention"), [name for name in SCALINGS if name != "longrope"])


def _without_images(name: str) -> str:
    """Return what a tensor is called in a model of text alone: the others have had two prefixes."""
    return re.sub(r"^language_model\.|(?<=^model\.)language_model\.", "", name)


GEMMA3_KEYS = {name: key for name, key in KEYS_OF_GEMMAS.items() if name != "attention_softcap"} | {
    "vocab_size": Key("vocab_size", 262208),
    "max_positions": Key("max_position_embeddings", 131072, free=True),
    "rope_theta": Computed(
        lambda config: _theta(config, "full_attention", "rope_theta", 1e6), lambda value: {"rope_theta": value}
    ),
    "rope_local_theta": Computed(
        lambda config: _theta(config, "sliding_attention", "rope_local_base_freq", 1e4),
        lambda value: {"rope_local_base_freq": value},
    ),
    "rope_scaling": Computed(_rope_scaling, write_scaling),
    "logits_softcap": cap("final_logit_softcapping", None),
    "sliding_window": Computed(lambda config: window(_kinds(config), config), lambda value: {"sliding_window": value}),
    "local_layers": Computed(lambda config: local_layers(_kinds(config))),
}

FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="Gemma3ForCausalLM",
            same_head=("Gemma3ForConditionalGeneration",),
            model=gpt.Decoder,
            parts={},
            keys=GEMMA3_KEYS,
            constants={name: value for name, value in CONSTANTS.items() if name not in GEMMA3_KEYS}
            | {"norms": "around", "query_key_norm": True},
            complete=complete_gemma,
            more=write_layers,
        )
    },
    tensors=tensors(ABOVE_ONE, AROUND),
    # Transformers reads the cap of scores, and computes without it.
    only=ONLY | {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    unused=[*UNUSED, r"(model\.)?(vision_tower|multi_modal_projector)\..*"],
    copies=COPIES,
    rename=_without_images,
)
