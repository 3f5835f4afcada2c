"""SigLIP (Zhai 2023) in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import UserError
from research.models import vit
from research.models.clip import SigLip, TextEncoder
from research.pretrained import family
from research.pretrained.clip import ONLY, TOWERS, UNUSED, image_keys, scoped, section, tower_keys, write_section
from research.pretrained.family import Family, Key, Kind, Layout, Tensor

_IMAGE = image_keys(16, 12, 1e-6, "gelu_pytorch_tanh")
_TEXT = tower_keys(768, 12, 1e-6, "gelu_pytorch_tanh") | {
    "vocab_size": Key("vocab_size", 32000),
    "max_positions": Key("max_position_embeddings", 64),
}
_PARTS = ("query", "key", "value")
_PROBE = Layout(lambda x: [x[0]], lambda x: x[None])
_KERNELS = Layout(lambda x: [part.T for part in np.split(x, 3)], lambda *ours: np.concatenate([x.T for x in ours]))
_BIASES = Layout(lambda x: np.split(x, 3), lambda *ours: np.concatenate(ours))
_HEAD = "vision_model.head"


class _SigLip(Family):
    """A family whose config.json must agree with itself."""

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise UserError if `config` asks for what we do not implement."""
        super().check(config)
        image, text = (section(config, f"{name}_config") for name in ("vision", "text"))
        width = _IMAGE["hidden_size"].read(image)
        own = text.get("projection_size")
        if (_TEXT["hidden_size"].read(text) if own is None else own) != width:
            raise UserError(f"config.json projects texts to {own}, images to {width}; they must be equal")
        if image.get("vision_use_head", True) is not True:
            raise UserError("config.json has vision_use_head=false, without which images are not represented")


FAMILY = _SigLip(
    prefix="",
    kinds={
        "dual_encoder": Kind(
            architecture="SiglipModel",
            model=SigLip,
            parts={"image": vit.Encoder, "text": TextEncoder},
            scoped=True,
            keys=scoped("image", "vision_config", _IMAGE) | scoped("text", "text_config", _TEXT),
            constants={
                "image_prefix_tokens": 0,
                "image_positions": "learned",
                "image_patch_bias": True,
                "image_embedding_norm": False,
                "image_use_bias": True,
                "image_gated": False,
                "image_layer_scale": None,
                "text_causal": False,
            },
            more=lambda fields: {
                "vision_config": write_section("image", _IMAGE, fields),
                "text_config": write_section("text", _TEXT, fields) | {"projection_size": fields["image_hidden_size"]},
            },
        )
    },
    tensors=[
        *TOWERS,
        Tensor(("image/patches/bias",), "vision_model.embeddings.patch_embedding.bias"),
        *family.linear("text_projection", "text_model.head"),
        Tensor(("pool/probe",), f"{_HEAD}.probe", _PROBE),
        Tensor(tuple(f"pool/attention/{x}/kernel" for x in _PARTS), f"{_HEAD}.attention.in_proj_weight", _KERNELS),
        Tensor(tuple(f"pool/attention/{x}/bias" for x in _PARTS), f"{_HEAD}.attention.in_proj_bias", _BIASES),
        *family.linear("pool/attention/out", f"{_HEAD}.attention.out_proj"),
        *family.norm("pool/mlp_norm", f"{_HEAD}.layernorm"),
        *family.linear("pool/mlp/up", f"{_HEAD}.mlp.fc1"),
        *family.linear("pool/mlp/down", f"{_HEAD}.mlp.fc2"),
        Tensor(("logit_scale",), "logit_scale"),
        Tensor(("logit_bias",), "logit_bias"),
    ],
    only=ONLY,
    unused=UNUSED,
)
