"""DETR (Carion 2020) in Hugging Face's format.

Two kinds of ResNet can be the backbone there: Transformers' own, of any size, and timm's, whose tensors have other
names; published checkpoints have the latter. Both are read, and Transformers' own is written.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from research.errors import UserError, nearest
from research.models.detr import Detr
from research.models.resnet import ResNet
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind, Layout, Tensor

_TIMM = {
    "resnet18": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "resnet101": ("bottleneck", (3, 4, 23, 3), (256, 512, 1024, 2048)),
    "resnet152": ("bottleneck", (3, 8, 36, 3), (256, 512, 1024, 2048)),
}
_STAGES, _BLOCKS = 4, 36  # the most that any of them has
_BACKBONE = "model.backbone.conv_encoder.model."
_POINTWISE = Layout(lambda x: [x[:, :, 0, 0].T], lambda x: x.T[:, :, np.newaxis, np.newaxis])


def _backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the backbone that config.json describes, or raise UserError for any other network."""
    own = config.get("backbone_config") or {}
    timm = config.get("use_timm_backbone", True) if not own else own.get("model_type") == "timm_backbone"
    if timm:
        return _timm_backbone(config, own)
    if config.get("backbone") and not own:
        raise UserError(f"config.json has backbone={config['backbone']!r} without a backbone_config that describes it")
    kind = own.get("model_type", "resnet")
    if kind != "resnet":
        raise UserError(f"config.json has a backbone_config of model_type '{kind}'{nearest(kind, ['resnet'])}")
    return _own_backbone(own)


def _own_backbone(own: Mapping[str, Any]) -> dict[str, Any]:
    only = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    for key, value in only.items():
        if own.get(key, value) != value:
            raise UserError(
                f"config.json has backbone_config.{key}={own[key]!r}, of which only {value!r} is implemented"
            )
    depths = tuple(own.get("depths", (3, 4, 6, 3)))
    last = f"stage{len(depths)}"
    if (own.get("out_features") or [last])[-1] != last:
        raise UserError(
            f"config.json has backbone_config.out_features={own['out_features']}, which must end in '{last}'"
        )
    return {
        "block": own.get("layer_type", "bottleneck"),
        "depths": depths,
        "widths": tuple(own.get("hidden_sizes", (256, 512, 1024, 2048))),
        "stem_width": own.get("embedding_size", 64),
        "num_channels": own.get("num_channels", 3),
        "dilation": False,  # which Transformers has with timm's networks only
    }


def _timm_backbone(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    options = own or config.get("backbone_kwargs") or {}
    name = str(config.get("backbone") or own.get("backbone") or "resnet50").partition(".")[0]
    if name not in _TIMM:
        raise UserError(f"config.json has the unknown backbone '{name}'{nearest(name, _TIMM)}")
    stride = options.get("output_stride") or (16 if config.get("dilation") and not own else 32)
    if stride not in (16, 32):
        raise UserError(
            f"config.json has a backbone of output_stride {stride}, of which only 16 and 32 are implemented"
        )
    if max(options.get("out_indices") or [4]) not in (-1, 4):
        raise UserError(f"config.json has a backbone of out_indices {options['out_indices']}, which must end in 4")
    block, depths, widths = _TIMM[name]
    channels = options.get("num_channels", options.get("in_chans", config.get("num_channels", 3)))
    return {
        "block": block,
        "depths": depths,
        "widths": widths,
        "stem_width": 64,
        "num_channels": channels,
        "dilation": stride == 16,
    }


def _of_backbone(field: str) -> Computed:
    return Computed(lambda config: _backbone(config)[field])


def _more(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use_timm_backbone": False,
        "backbone_config": {
            "model_type": "resnet",
            "layer_type": fields["block"],
            "depths": list(fields["depths"]),
            "hidden_sizes": list(fields["widths"]),
            "embedding_size": fields["stem_width"],
            "num_channels": fields["num_channels"],
            "hidden_act": "relu",
            "downsample_in_bottleneck": False,
            "downsample_in_first_stage": False,
            "out_features": [f"stage{len(fields['depths'])}"],
        },
        "num_channels": fields["num_channels"],
        "position_embedding_type": "sine",
        "auxiliary_loss": False,  # with which Transformers normalises between the layers of the decoder
        "is_encoder_decoder": True,
    }


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    pairs = {
        "num_decoder_layers": "num_layers",
        "num_decoder_heads": "num_heads",
        "decoder_intermediate_size": "intermediate_size",
    }
    return fields | {one: fields[other] if fields[one] is None else fields[one] for one, other in pairs.items()}


def _rename(name: str) -> str:
    """Return Transformers' name of a tensor of its own ResNet for timm's name of it."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    changes: dict[str, Callable[[re.Match[str]], str]] = {
        r"(?<=conv_encoder\.model\.)(conv|bn)1\.": lambda m: f"embedder.embedder.{kinds[m[1]]}.",
        r"(?<=conv_encoder\.model\.)layer(\d)\.(\d+)\.": lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
        r"(stages\.\d\.layers\.\d+)\.(conv|bn)(\d)\.": lambda m: f"{m[1]}.layer.{int(m[3]) - 1}.{kinds[m[2]]}.",
        r"\.downsample\.([01])\.": lambda m: f".shortcut.{kinds[m[1]]}.",
    }
    for pattern, change in changes.items():
        name = re.sub(pattern, change, name)
    return name


def _conv(ours: str, ours_norm: str, theirs: str) -> list[Tensor]:
    """A convolution and its frozen norm."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
    norm = [Tensor((f"{ours_norm}/{one}",), f"{theirs}.normalization.{other}") for one, other in names.items()]
    return [Tensor((f"{ours}/kernel",), f"{theirs}.convolution.weight", family.CONVOLUTION), *norm]


def _block(stage: int, number: int) -> list[Tensor]:
    ours = f"backbone/stage{stage + 1}_block{number}"
    theirs = f"{_BACKBONE}encoder.stages.{stage}.layers.{number}"
    tensors = [
        tensor
        for i in range(3)
        for tensor in _conv(f"{ours}/conv{i + 1}", f"{ours}/norm{i + 1}", f"{theirs}.layer.{i}")
    ]
    shortcut = _conv(f"{ours}/shortcut_conv", f"{ours}/shortcut_norm", f"{theirs}.shortcut") if number == 0 else []
    return [*tensors, *shortcut]


def _attention(ours: str, theirs: str) -> list[Tensor]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return [t for one, other in names.items() for t in family.linear(f"{ours}/{one}", f"{theirs}.{other}")]


def _layers(side: str) -> list[Tensor]:
    """The names of the encoder's or the decoder's layers."""
    ours, theirs = f"{side}/layers", f"model.{side}.layers.{{}}."
    cross = [
        *_attention(f"{ours}/cross_attention", f"{theirs}encoder_attn"),
        *family.norm(f"{ours}/cross_attention_norm", f"{theirs}encoder_attn_layer_norm"),
    ]
    return [
        *_attention(f"{ours}/attention", f"{theirs}self_attn"),
        *family.norm(f"{ours}/attention_norm", f"{theirs}self_attn_layer_norm"),
        *(cross if side == "decoder" else []),
        *family.linear(f"{ours}/mlp/up", f"{theirs}fc1"),
        *family.linear(f"{ours}/mlp/down", f"{theirs}fc2"),
        *family.norm(f"{ours}/mlp_norm", f"{theirs}final_layer_norm"),
    ]


FAMILY = Family(
    prefix="model.",
    kinds={
        "detector": Kind(
            architecture="DetrForObjectDetection",
            model=Detr,
            parts={"backbone": ResNet},
            keys={
                "num_queries": Key("num_queries", 100),
                "hidden_size": Key("d_model", 256),
                "num_layers": Key("encoder_layers", 6),
                "num_decoder_layers": Key("decoder_layers", 6),
                "num_heads": Key("encoder_attention_heads", 8),
                "num_decoder_heads": Key("decoder_attention_heads", 8),
                "intermediate_size": Key("encoder_ffn_dim", 2048),
                "decoder_intermediate_size": Key("decoder_ffn_dim", 2048),
                "activation": Key("activation_function", "relu"),
                "dropout": Key("dropout", 0.1, free=True),
                "attention_dropout": Key("attention_dropout", 0.0, free=True),
                "activation_dropout": Key("activation_dropout", 0.0, free=True),
                **{
                    field: _of_backbone(field)
                    for field in ("block", "depths", "widths", "stem_width", "num_channels", "dilation")
                },
            },
            constants={
                "layer_norm_epsilon": 1e-5,
                "input_positions": False,
                "norm": "frozen",
                "stem_kernel": 7,
                "stem_stride": 2,
                "stem_pool": True,
            },
            complete=_complete,
            more=_more,
        )
    },
    tensors=[
        *_conv("backbone/stem_conv", "backbone/stem_norm", f"{_BACKBONE}embedder.embedder"),
        *(tensor for stage in range(_STAGES) for number in range(_BLOCKS) for tensor in _block(stage, number)),
        Tensor(("projection/kernel",), "model.input_projection.weight", _POINTWISE),
        Tensor(("projection/bias",), "model.input_projection.bias"),
        *_layers("encoder"),
        *_layers("decoder"),
        *family.norm("decoder/norm", "model.decoder.layernorm"),
        Tensor(("queries",), "model.query_position_embeddings.weight"),
        *family.linear("class_head", "class_labels_classifier", part="head"),
        *(
            tensor
            for i, name in enumerate(("hidden1", "hidden2", "output"))
            for tensor in family.linear(f"box_head/{name}", f"bbox_predictor.layers.{i}", part="box_head")
        ),
    ],
    only={
        "position_embedding_type": "sine",
        "auxiliary_loss": False,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "scale_embedding": False,
        "is_encoder_decoder": True,
        "quantization_config": {},
    },
    unused=[re.escape(_BACKBONE) + r".*\.num_batches_tracked"],
    rename=_rename,
    modules=(
        (r"out_proj\.", "o_proj."),
        (r"(layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
        (r"backbone\.conv_encoder\.model\.", "backbone.model."),
    ),
)
