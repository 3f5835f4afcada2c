"""GPT-2 (Radford 2019) in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.models import gpt
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor

_LAYER = "transformer.h.{}."
# One array holds what makes queries, keys and values, side by side.
_FUSED = Layout(lambda x: np.split(x, 3, axis=-1), lambda *ours: np.concatenate(ours, axis=-1))


# What most families of decoders lack.
LACKING = {
    "rope_local_theta": None,
    "rope_share": 1.0,
    "norms": "before",
    "query_key_norm": False,
    "query_key_norm_whole": False,
    "query_scale": None,
    "attention_softcap": None,
    "sliding_window": None,
    "local_layers": None,
    "logits_softcap": None,
    "embedding_scale": 1.0,
}


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a decoder with its heads, and its layers that differ, written out."""
    heads, local = fields["num_heads"], fields["local_layers"]
    return fields | {
        "local_layers": None if local is None or len(set(local)) == 1 else tuple(local),
        "sliding_window": None if local is not None and not any(local) else fields["sliding_window"],
        "num_kv_heads": fields["num_kv_heads"] or heads,
        "head_width": fields["head_width"] or fields["hidden_size"] // heads,
    }


def _inner(config: Mapping[str, Any]) -> Any:
    return config.get("n_inner") or 4 * _HIDDEN.read(config)


def _linear(ours: str, theirs: str) -> list[Tensor]:
    """A linear layer whose kernel is kept as ours are, [in, out]."""
    return [Tensor((f"{ours}/kernel",), f"{theirs}.weight"), Tensor((f"{ours}/bias",), f"{theirs}.bias")]


def _fused(name: str, theirs: str) -> Tensor:
    return Tensor(tuple(f"layers/attention/{part}/{name}" for part in ("query", "key", "value")), theirs, _FUSED)


_HIDDEN = Key("n_embd", 768, fallback="hidden_size")
_HEADS = Key("n_head", 12, fallback="num_attention_heads")

FAMILY = Family(
    prefix="transformer.",
    kinds={
        "causal_lm": Kind(
            architecture="GPT2LMHeadModel",
            model=gpt.Decoder,
            parts={},
            keys={
                "vocab_size": Key("vocab_size", 50257),
                "hidden_size": _HIDDEN,
                "num_layers": Key("n_layer", 12, fallback="num_hidden_layers"),
                "num_kv_heads": _HEADS,
                "num_heads": _HEADS,
                "head_width": Computed(lambda config: family.head_width(config, _HIDDEN, _HEADS)),
                "intermediate_size": Computed(_inner, lambda value: {"n_inner": value}),
                "max_positions": Key("n_positions", 1024, fallback="max_position_embeddings"),
                "norm_epsilon": Key("layer_norm_epsilon", 1e-5),
                "activation": Key("activation_function", "gelu_new"),
                "tie_embeddings": Key("tie_word_embeddings", True),
                "dropout": Computed(
                    Key("resid_pdrop", 0.1).read, lambda value: {"resid_pdrop": value, "embd_pdrop": value}, free=True
                ),
                "attention_dropout": Key("attn_pdrop", 0.1, free=True),
                "initializer_range": Key("initializer_range", 0.02, free=True),
            },
            constants={
                "positions": "learned",
                "rope_theta": 10000.0,
                "rope_scaling": None,
                "norm": "layer",
                "gated": False,
                "attention_bias": True,
                "out_bias": True,
                "mlp_bias": True,
            }
            | LACKING,
            complete=complete,
        )
    },
    tensors=[
        *family.embedding("word", "transformer.wte"),
        *family.embedding("position", "transformer.wpe"),
        *family.norm("layers/attention_norm", _LAYER + "ln_1"),
        _fused("kernel", _LAYER + "attn.c_attn.weight"),
        _fused("bias", _LAYER + "attn.c_attn.bias"),
        *_linear("layers/attention/out", _LAYER + "attn.c_proj"),
        *family.norm("layers/mlp_norm", _LAYER + "ln_2"),
        *_linear("layers/mlp/up", _LAYER + "mlp.c_fc"),
        *_linear("layers/mlp/down", _LAYER + "mlp.c_proj"),
        *family.norm("norm_out", "transformer.ln_f"),
        *family.linear("head", "lm_head", part="head"),
    ],
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "pruned_heads": {},
        "per_layer_config": {},
        "quantization_config": {},
    },
    # Old files hold the causal mask of every layer, and the output layer although it is the word table.
    unused=[
        r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
        r"lm_head\.weight",
        r"score\.weight",
        r"multiple_choice_head\..*",
    ],
    copies={"lm_head.weight": "transformer.wte.weight"},
)
