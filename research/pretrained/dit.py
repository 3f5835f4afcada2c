"""DiT (Peebles 2022) in Diffusers' format: the folder `transformer` of a pipeline, say hf://facebook/DiT-XL-2-256/transformer/.

Diffusers gives every block embeddings of the time and the class of its own; those of the paper's model, and ours, are
shared: they are written once a block, and must be equal where they are read.
"""

from collections.abc import Mapping
from typing import Any

from research.errors import UserError, nearest
from research.models import dit
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Tensor

_LAYER = "transformer_blocks.{}."
_EMBEDDINGS = _LAYER + "norm1.emb."
_SHARED = "layers/modulation/kernel"  # a parameter of every block
_ACTIVATIONS = {"gelu-approximate": "gelu_pytorch_tanh", "gelu": "gelu", "linear-silu": "silu"}

_HEADS = Key("num_attention_heads", 16)
_WIDTH = Key("attention_head_dim", 72)
_CHANNELS = Key("in_channels", 4)


def _hidden(config: Mapping[str, Any]) -> int:
    return _HEADS.read(config) * _WIDTH.read(config)


def _learned_variance(config: Mapping[str, Any]) -> bool:
    channels = _CHANNELS.read(config)
    outputs = config.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise UserError(
            f"config.json has out_channels={outputs} for in_channels={channels}, which is neither 1 nor 2 each"
        )
    return outputs == 2 * channels


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("activation_fn", "gelu-approximate")
    if name not in _ACTIVATIONS:
        raise UserError(f"config.json has the unknown activation_fn '{name}'{nearest(str(name), _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _write_activation(value: str) -> dict[str, Any]:
    return {"activation_fn": next((name for name, ours in _ACTIVATIONS.items() if ours == value), value)}


def _more(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_head_dim": fields["hidden_size"] // fields["num_heads"],
        "out_channels": fields["num_channels"] * (2 if fields["learned_variance"] else 1),
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


def _shared(ours: str, theirs: str) -> list[Tensor]:
    return [
        Tensor((f"{ours}/kernel",), f"{_EMBEDDINGS}{theirs}.weight", family.TRANSPOSED, shared=_SHARED),
        Tensor((f"{ours}/bias",), f"{_EMBEDDINGS}{theirs}.bias", shared=_SHARED),
    ]


FAMILY = Family(
    prefix="",
    kinds={
        "denoiser": Kind(
            architecture="DiTTransformer2DModel",
            model=dit.DiT,
            parts={},
            keys={
                "image_size": Key("sample_size", 32),
                "patch_size": Key("patch_size", 2),
                "num_channels": _CHANNELS,
                "num_classes": Key("num_embeds_ada_norm", 1000),
                "hidden_size": Computed(_hidden),
                "num_layers": Key("num_layers", 28),
                "num_heads": _HEADS,
                "intermediate_size": Computed(lambda config: 4 * _hidden(config)),
                "learned_variance": Computed(_learned_variance),
                "activation": Computed(_activation, _write_activation),
                "use_bias": Key("attention_bias", True),
                "mlp_norm_epsilon": Key("norm_eps", 1e-5),
                "dropout": Key("dropout", 0.0, free=True),
            },
            constants={},
            more=_more,
        )
    },
    tensors=[
        Tensor(("patches/kernel",), "pos_embed.proj.weight", family.CONVOLUTION),
        Tensor(("patches/bias",), "pos_embed.proj.bias"),
        *_shared("time/up", "timestep_embedder.linear_1"),
        *_shared("time/down", "timestep_embedder.linear_2"),
        Tensor(("label/embedding",), f"{_EMBEDDINGS}class_embedder.embedding_table.weight", shared=_SHARED),
        *family.linear("layers/modulation", _LAYER + "norm1.linear"),
        *family.linear("layers/attention/query", _LAYER + "attn1.to_q"),
        *family.linear("layers/attention/key", _LAYER + "attn1.to_k"),
        *family.linear("layers/attention/value", _LAYER + "attn1.to_v"),
        *family.linear("layers/attention/out", _LAYER + "attn1.to_out.0"),
        *family.linear("layers/mlp/up", _LAYER + "ff.net.0.proj"),
        *family.linear("layers/mlp/down", _LAYER + "ff.net.2"),
        *family.linear("modulation", "proj_out_1"),
        *family.linear("output", "proj_out_2"),
    ],
    only={"norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "quantization_config": {}},
    unused=[r"pos_embed\.pos_embed"],  # old files hold the fixed positions
    # The second one is what the published files say.
    diffusers=("DiTTransformer2DModel", "Transformer2DModel"),
)
