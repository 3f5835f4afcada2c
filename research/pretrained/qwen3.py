"""Qwen3 (Yang 2025) in Hugging Face's format."""

from research.models import gpt
from research.pretrained.family import Family, Key, Kind
from research.pretrained.gpt2 import complete
from research.pretrained.llama import BIASES, COPIES, ONLY, UNUSED, tensors
from research.pretrained.qwen2 import QWEN_CONSTANTS, QWEN_KEYS, write_mixed

FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="Qwen3ForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=QWEN_KEYS | BIASES | {"head_width": Key("head_dim", 128)},
            constants=QWEN_CONSTANTS | {"query_key_norm": True},
            complete=complete,
            more=write_mixed,
        )
    },
    tensors=tensors(),
    only=ONLY,
    unused=UNUSED,
    copies=COPIES,
)
