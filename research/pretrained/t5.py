"""T5 (Raffel 2019), its version 1.1 and Flan-T5 (Chung 2022) in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

from research.models.encoder_decoder import EncoderDecoder
from research.pretrained.family import TRANSPOSED, Computed, Family, Key, Kind, Tensor

_HIDDEN = Key("d_model", 512)
_DROPOUT = Key("dropout_rate", 0.1, free=True)


def _scaled(config: Mapping[str, Any]) -> bool:
    """Return whether hidden states are scaled before the output layer, which is when that is the word table.

    Transformers 4 says so by tie_word_embeddings; 5 always writes that as true, and says so by scale_decoder_outputs.
    """
    scaled = config.get("scale_decoder_outputs")
    return config.get("tie_word_embeddings") is not False if scaled is None else scaled


def _logits_scale(config: Mapping[str, Any]) -> float:
    return _HIDDEN.read(config) ** -0.5 if _scaled(config) else 1.0


def _projection(config: Mapping[str, Any]) -> list[str]:
    return str(Key("feed_forward_proj", "relu").read(config)).split("-")


def _activation(config: Mapping[str, Any]) -> str:
    # "gated-gelu" means the approximation by tanh, "gelu" alone the exact one.
    name = _projection(config)[-1]
    return "gelu_new" if _projection(config) == ["gated", "gelu"] else name


def _more(fields: Mapping[str, Any]) -> dict[str, Any]:
    activation = fields["activation"]
    gated = {"gelu_new": "gated-gelu"}.get(activation, f"gated-{activation}")
    return {"feed_forward_proj": gated if fields["gated"] else activation, "is_encoder_decoder": True}


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    width, heads, layers = fields["hidden_size"], fields["num_heads"], fields["num_layers"]
    return fields | {
        "num_decoder_layers": layers if fields["num_decoder_layers"] is None else fields["num_decoder_layers"],
        "head_width": width // heads if fields["head_width"] is None else fields["head_width"],
        "embedding_scale": width**0.5 if fields["embedding_scale"] is None else fields["embedding_scale"],
    }


def _linear(ours: str, theirs: str, **where: Any) -> Tensor:
    return Tensor((f"{ours}/kernel",), f"{theirs}.weight", TRANSPOSED, **where)


def _scale(ours: str, theirs: str) -> Tensor:
    return Tensor((f"{ours}/scale",), f"{theirs}.weight")


def _attention(ours: str, theirs: str) -> list[Tensor]:
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return [_linear(f"{ours}/{name}", f"{theirs}.{letter}") for name, letter in names.items()]


def _side(side: str) -> list[Tensor]:
    """The names of the encoder's or the decoder's parameters."""
    ours, theirs, last = f"{side}/layers", f"{side}.block.{{}}.layer", 1
    tensors = [
        Tensor(
            (f"{side}/relative_bias/embedding",),
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        *_attention(f"{ours}/attention", f"{theirs}.0.SelfAttention"),
        _scale(f"{ours}/attention_norm", f"{theirs}.0.layer_norm"),
    ]
    if side == "decoder":
        last = 2
        tensors += [
            *_attention(f"{ours}/cross_attention", f"{theirs}.1.EncDecAttention"),
            _scale(f"{ours}/cross_attention_norm", f"{theirs}.1.layer_norm"),
        ]
    mlp, gate = f"{theirs}.{last}.DenseReluDense", f"{ours}/mlp/gate/kernel"
    return [
        *tensors,
        _linear(f"{ours}/mlp/gate", f"{mlp}.wi_0"),
        _linear(f"{ours}/mlp/up", f"{mlp}.wi_1", beside=gate),
        _linear(f"{ours}/mlp/up", f"{mlp}.wi", unless=gate),
        _linear(f"{ours}/mlp/down", f"{mlp}.wo"),
        _scale(f"{ours}/mlp_norm", f"{theirs}.{last}.layer_norm"),
        _scale(f"{side}/norm", f"{side}.final_layer_norm"),
    ]


FAMILY = Family(
    prefix="",
    kinds={
        "encoder_decoder": Kind(
            architecture="T5ForConditionalGeneration",
            model=EncoderDecoder,
            parts={},
            keys={
                "vocab_size": Key("vocab_size", 32128),
                "hidden_size": _HIDDEN,
                "num_layers": Key("num_layers", 6),
                "num_decoder_layers": Key("num_decoder_layers", 6, fallback="num_layers"),
                "num_heads": Key("num_heads", 8),
                "head_width": Key("d_kv", 64),
                "intermediate_size": Key("d_ff", 2048),
                "relative_buckets": Key("relative_attention_num_buckets", 32),
                "relative_max_distance": Key("relative_attention_max_distance", 128),
                "norm_epsilon": Key("layer_norm_epsilon", 1e-6),
                "activation": Computed(_activation),
                "gated": Computed(lambda config: _projection(config)[0] == "gated"),
                "tie_embeddings": Computed(
                    _scaled, lambda value: {"tie_word_embeddings": value, "scale_decoder_outputs": value}
                ),
                "logits_scale": Computed(_logits_scale),
                "activation_dropout": _DROPOUT,
                "attention_dropout": _DROPOUT,
                "dropout": _DROPOUT,
            },
            constants={
                "positions": "relative",
                "embedding_norm": False,
                "norm": "rms",
                "norm_first": True,
                "use_bias": False,
                "embedding_scale": 1.0,
                "logits_bias": False,
            },
            complete=_complete,
            more=_more,
            defaults={"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        )
    },
    tensors=[
        Tensor(("word/embedding",), "shared.weight"),
        *_side("encoder"),
        *_side("decoder"),
        # Transformers 5 leaves it out where it equals the word table, also of models that need not have them equal.
        _linear("head", "lm_head", instead="shared.weight"),
    ],
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    only={"is_decoder": False, "is_encoder_decoder": True, "quantization_config": {}},
    unused=[
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"lm_head\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ],
)
