"""Llama (Touvron 2023; Grattafiori 2024) and what is built like it, such as SmolLM2, in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

from research.errors import UserError, nearest
from research.models import gpt
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind
from research.pretrained.gpt2 import complete

_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the base of the rotary wavelengths, which Transformers 5 keeps among the parameters below."""
    theta = _rope_parameters(config).get("rope_theta")
    if theta is None:
        theta = config.get("rope_theta")
    return 10000.0 if theta is None else float(theta)


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how rotary wavelengths are stretched, as `layers.rotary_angles` takes it.

    Transformers 4 keeps it in `rope_scaling`, under "type" at first, Transformers 5 in `rope_parameters`.
    """
    parameters = _rope_parameters(config)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _SCALINGS:
        raise UserError(f"config.json has the unknown rope_type '{kind}'{nearest(str(kind), _SCALINGS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        factor = parameters["partial_rotary_factor"]
        raise UserError(f"config.json has partial_rotary_factor={factor!r}, of which only 1.0 is implemented")
    original = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    values = {"original_max_position_embeddings": original} | parameters
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_SCALINGS["llama3"]}
    unknown, missing = sorted(set(parameters) - known), [name for name in _SCALINGS[kind] if values.get(name) is None]
    if unknown or missing:
        problem = f"unknown {unknown[0]}" if unknown else f"{missing[0]} missing"
        raise UserError(f"config.json has rotary positions of rope_type '{kind}' with {problem}")
    return {"rope_type": kind} | {name: values[name] for name in _SCALINGS[kind]} if kind != "default" else None


def head_width(config: Mapping[str, Any]) -> int:
    """Return the width of a head, which need not be a share of the hidden states'."""
    if config.get("head_dim") is not None:
        return config["head_dim"]
    return family.head_width(config, HIDDEN, HEADS)


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


HIDDEN = Key("hidden_size", 4096)
HEADS = Key("num_attention_heads", 32)
KEYS: dict[str, Key | Computed] = {
    "vocab_size": Key("vocab_size", 32000),
    "hidden_size": HIDDEN,
    "num_layers": Key("num_hidden_layers", 32),
    "num_heads": HEADS,
    "num_kv_heads": Key("num_key_value_heads", 32, fallback="num_attention_heads"),
    "head_width": Computed(head_width, lambda value: {"head_dim": value}),
    "intermediate_size": Key("intermediate_size", 11008),
    "max_positions": Key("max_position_embeddings", 2048, free=True),
    "rope_theta": Computed(rope_theta, lambda value: {"rope_theta": value}),
    "rope_scaling": Computed(rope_scaling, lambda value: {"rope_scaling": value}),
    "norm_epsilon": Key("rms_norm_eps", 1e-6),
    "activation": Key("hidden_act", "silu"),
    "tie_embeddings": Key("tie_word_embeddings", False),
    "attention_dropout": Key("attention_dropout", 0.0, free=True),
    "initializer_range": Key("initializer_range", 0.02, free=True),
}
BIASES = {"attention_bias": Key("attention_bias", False), "out_bias": Key("attention_bias", False)}
CONSTANTS = {
    "positions": "rotary",
    "norm": "rms",
    "gated": True,
    "mlp_bias": False,
    "query_key_norm": False,
    "sliding_window": None,
    "embedding_scale": 1.0,
}
ONLY = {"pretraining_tp": 1, "partial_rotary_factor": 1.0, "per_layer_config": {}, "quantization_config": {}}
# Old files hold the rotary frequencies, some the output layer although it is the word table.
UNUSED = [r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", r"lm_head\.weight", r"score\.weight"]
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}


def tensors(norm: family.Layout = family.SAME) -> list[family.Tensor]:
    """The names of a decoder's parameters; `norm` is how the scales of its norms are kept."""
    layer = "model.layers.{}."

    def scale(ours: str, theirs: str) -> family.Tensor:
        return family.Tensor((f"{ours}/scale",), f"{theirs}.weight", norm)

    return [
        *family.embedding("word", "model.embed_tokens"),
        scale("layers/attention_norm", layer + "input_layernorm"),
        *family.linear("layers/attention/query", layer + "self_attn.q_proj"),
        *family.linear("layers/attention/key", layer + "self_attn.k_proj"),
        *family.linear("layers/attention/value", layer + "self_attn.v_proj"),
        *family.linear("layers/attention/out", layer + "self_attn.o_proj"),
        scale("layers/attention/query_norm", layer + "self_attn.q_norm"),
        scale("layers/attention/key_norm", layer + "self_attn.k_norm"),
        scale("layers/mlp_norm", layer + "post_attention_layernorm"),
        *family.linear("layers/mlp/gate", layer + "mlp.gate_proj"),
        *family.linear("layers/mlp/up", layer + "mlp.up_proj"),
        *family.linear("layers/mlp/down", layer + "mlp.down_proj"),
        scale("norm_out", "model.norm"),
        *family.linear("head", "lm_head", part="head"),
    ]


FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="LlamaForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=KEYS | BIASES | {"mlp_bias": Key("mlp_bias", False)},
            constants={name: value for name, value in CONSTANTS.items() if name != "mlp_bias"},
            complete=complete,
        )
    },
    tensors=tensors(),
    only=ONLY,
    unused=UNUSED,
    copies=COPIES,
)
