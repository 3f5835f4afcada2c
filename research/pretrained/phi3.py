"""Phi-3 (Abdin 2024) and what is built like it, such as Phi-4, in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import UserError
from research.models import gpt
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor
from research.pretrained.gpt2 import complete
from research.pretrained.llama import CONSTANTS, COPIES, KEYS, ONLY, UNUSED, rope_parameters, scaling, tensors

_STACKED = Layout(
    lambda x, shapes: np.split(x.T, np.cumsum([shape[-1] for shape in shapes])[:-1], axis=-1),
    lambda *ours: np.concatenate(ours, axis=-1).T,
    sized=True,
)
_QUERY, _KEY, _VALUE = (f"layers/attention/{part}/kernel" for part in ("query", "key", "value"))
_GATE, _UP = (f"layers/mlp/{part}/kernel" for part in ("gate", "up"))
# Layers with the same input are one, below each other.
_FUSED = [
    Tensor((_QUERY, _KEY, _VALUE), "model.layers.{}.self_attn.qkv_proj.weight", _STACKED),
    Tensor((_GATE, _UP), "model.layers.{}.mlp.gate_up_proj.weight", _STACKED),
]
_APART = [line for line in tensors() if not {*line.ours} & {_QUERY, _KEY, _VALUE, _GATE, _UP}]
_ORIGINAL = Key("original_max_position_embeddings", 4096)


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rotary scaling, whose kind the first files call "su" or "yarn" and mean LongRoPE."""
    parameters = dict(rope_parameters(config))
    kind = parameters.pop("type", "default")
    kind = parameters.get("rope_type", kind)
    parameters["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    return scaling({_ORIGINAL.name: _ORIGINAL.read(config)} | dict(config), parameters, ("default", "longrope"))


def _write_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the three keys that Transformers 4 insists on, and the lengths whose ratio is the factor."""
    if scaling is None:
        return {"rope_scaling": None}
    if scaling.get("attention_factor") is not None:
        raise UserError("Phi3ForCausalLM has no place for the attention_factor of its rotary positions")
    factors = {name: scaling.get(name) for name in ("short_factor", "long_factor")}
    original, factor = (scaling.get(name) or 1 for name in (_ORIGINAL.name, "factor"))
    lengths = {_ORIGINAL.name: original, "max_position_embeddings": round(factor * original)}
    return {"rope_scaling": {"type": scaling.get("rope_type")} | factors} | lengths


def _rope_share(config: Mapping[str, Any]) -> float:
    share = rope_parameters(config).get("partial_rotary_factor")
    share = config.get("partial_rotary_factor") if share is None else share
    return 1.0 if share is None else float(share)


FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="Phi3ForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=KEYS
            | {
                "vocab_size": Key("vocab_size", 32064),
                "hidden_size": Key("hidden_size", 3072),
                "intermediate_size": Key("intermediate_size", 8192),
                "max_positions": Key("max_position_embeddings", 4096, free=True),
                "norm_epsilon": Key("rms_norm_eps", 1e-5),
                "rope_scaling": Computed(_rope_scaling, _write_scaling),
                "rope_share": Computed(_rope_share, lambda value: {"partial_rotary_factor": value}),
                "sliding_window": Computed(
                    lambda config: config.get("sliding_window"), lambda value: {"sliding_window": value}
                ),
            },
            constants={name: value for name, value in CONSTANTS.items() if name not in ("rope_share", "sliding_window")}
            | {"attention_bias": False, "out_bias": False},
            complete=complete,
        )
    },
    tensors=[*_FUSED, *_APART],
    only={name: value for name, value in ONLY.items() if name != "partial_rotary_factor"} | {"layer_types": None},
    unused=UNUSED,
    copies=COPIES,
)
