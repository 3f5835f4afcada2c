"""OLMo 2 (OLMo Team 2024) in Hugging Face's format."""

from research.models import gpt
from research.pretrained.family import Family, Key, Kind
from research.pretrained.gpt2 import complete
from research.pretrained.llama import AFTER, BIASES, CONSTANTS, COPIES, KEYS, ONLY, UNUSED, tensors

FAMILY = Family(
    prefix="model.",
    kinds={
        "causal_lm": Kind(
            architecture="Olmo2ForCausalLM",
            model=gpt.Decoder,
            parts={},
            keys=KEYS | BIASES | {"vocab_size": Key("vocab_size", 50304), "norm_epsilon": Key("rms_norm_eps", 1e-5)},
            constants=CONSTANTS | {"norms": "after", "query_key_norm": True, "query_key_norm_whole": True},
            complete=complete,
        )
    },
    tensors=tensors(norms=AFTER),
    only=ONLY,
    unused=UNUSED,
    copies=COPIES,
)
