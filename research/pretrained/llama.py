"""Llama (Touvron 2023; Grattafiori 2024) and what is built like it, such as SmolLM2, in Hugging Face's format."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError, nearest
from research.models import gpt
from research.models.positions import SCALINGS
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind
from research.pretrained.gpt2 import LACKING, complete

# What may stand among the parameters of every kind.
_BESIDE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
_SCALINGS = [name for name in SCALINGS if name != "longrope"]


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the base of the rotary wavelengths, which Transformers 5 keeps among the parameters below."""
    theta = rope_parameters(config).get("rope_theta")
    if theta is None:
        theta = config.get("rope_theta")
    return 10000.0 if theta is None else float(theta)


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how rotary wavelengths are stretched, as `positions.rotary_angles` takes it.

    Transformers 4 keeps it in `rope_scaling`, under "type" at first, Transformers 5 in `rope_parameters`.
    """
    parameters = rope_parameters(config)
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        factor = parameters["partial_rotary_factor"]
        raise UserError(f"config.json has partial_rotary_factor={factor!r}, of which only 1.0 is implemented")
    return scaling(config, parameters, _SCALINGS)


def scaling(config: Mapping[str, Any], parameters: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any] | None:
    """Return what `parameters` say of rotary wavelengths, with what they leave to the rest of config.json."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in kinds:
        raise UserError(f"config.json has the unknown rope_type '{kind}'{nearest(str(kind), kinds)}")
    needed, optional = SCALINGS[kind].needed, SCALINGS[kind].optional
    longest, original = config.get("max_position_embeddings"), config.get("original_max_position_embeddings")
    values = {"original_max_position_embeddings": longest, **parameters}
    if original is not None:  # Transformers prefers it
        values["original_max_position_embeddings"] = original
    if kind == "dynamic":  # for which Transformers knows no other length
        if values["original_max_position_embeddings"] != longest:
            raise UserError("config.json has dynamic rotary positions of an original length other than its longest")
    elif kind in ("yarn", "longrope") and values.get("factor") is None and longest:
        values["factor"] = longest / (values["original_max_position_embeddings"] or longest)
    known = {*_BESIDE, *SCALINGS["llama3"].needed, *needed, *optional}
    unknown, missing = sorted(set(parameters) - known), [name for name in needed if values.get(name) is None]
    if unknown or missing:
        problem = f"unknown {unknown[0]}" if unknown else f"{missing[0]} missing"
        raise UserError(f"config.json has rotary positions of rope_type '{kind}' with {problem}")
    if kind == "default":
        return None
    given = [*needed, *(name for name in optional if values.get(name) is not None)]
    return {"rope_type": kind} | {
        name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in given
    }


def write_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what config.json holds of the rotary scaling, for Transformers 4 and 5.

    The original length of the kind "dynamic" is that of config.json itself, whatever length the model trained at.
    """
    if not scaling or scaling.get("rope_type") != "dynamic":
        return {"rope_scaling": scaling and dict(scaling)}
    return {
        "rope_scaling": {"rope_type": "dynamic", "factor": scaling.get("factor")},
        "max_position_embeddings": scaling.get("original_max_position_embeddings"),
    }


def layer_types(config: Mapping[str, Any], default: Sequence[str]) -> Sequence[str]:
    """Return each layer's kind, "sliding_attention" or "full_attention"; raise UserError for another."""
    kinds = config.get("layer_types") or default
    if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise UserError(f"config.json has the unknown layer_type '{unknown[0]}'")
    return kinds


def local_layers(kinds: Sequence[str]) -> tuple[bool, ...] | None:
    """Return which layers keep to the window; None where all do alike."""
    return tuple(kind == "sliding_attention" for kind in kinds) if len(set(kinds)) > 1 else None


def write_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json holds of the layers' kinds for a model of these fields."""
    local = fields["local_layers"]
    if local is None:
        local = fields["num_layers"] * [fields["sliding_window"] is not None]
    return {"layer_types": ["sliding_attention" if keeps else "full_attention" for keeps in local]}


def head_width(config: Mapping[str, Any]) -> int:
    """Return the width of a head, which need not be a share of the hidden states'."""
    if config.get("head_dim") is not None:
        return config["head_dim"]
    return family.head_width(config, HIDDEN, HEADS)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of rotary positions in one place."""
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
    "rope_scaling": Computed(rope_scaling, write_scaling),
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
} | LACKING
ONLY = {"pretraining_tp": 1, "partial_rotary_factor": 1.0, "per_layer_config": {}, "quantization_config": {}}
# Old files hold the rotary frequencies, some the output layer although it is the word table.
UNUSED = [r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", r"lm_head\.weight", r"score\.weight"]
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}


# Their names of our norms, by `blocks.NORMS`.
BEFORE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
AFTER = {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
AROUND = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def tensors(norm: family.Layout = family.SAME, norms: Mapping[str, str] = BEFORE) -> list[family.Tensor]:
    """The names of a decoder's parameters; `norm` is how the scales of its norms are kept, `norms` their names."""
    layer = "model.layers.{}."

    def scale(ours: str, theirs: str) -> family.Tensor:
        return family.Tensor((f"{ours}/scale",), f"{theirs}.weight", norm)

    return [
        *family.embedding("word", "model.embed_tokens"),
        *(scale(f"layers/{ours}", layer + theirs) for ours, theirs in norms.items()),
        *family.linear("layers/attention/query", layer + "self_attn.q_proj"),
        *family.linear("layers/attention/key", layer + "self_attn.k_proj"),
        *family.linear("layers/attention/value", layer + "self_attn.v_proj"),
        *family.linear("layers/attention/out", layer + "self_attn.o_proj"),
        scale("layers/attention/query_norm", layer + "self_attn.q_norm"),
        scale("layers/attention/key_norm", layer + "self_attn.k_norm"),
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
