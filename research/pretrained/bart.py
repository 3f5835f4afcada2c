"""BART (Lewis 2019) in Hugging Face's format: a Marian with learned positions and a norm after the embeddings."""

import numpy as np

from research.models.encoder_decoder import EncoderDecoder
from research.pretrained import family
from research.pretrained.family import Family, Key, Kind, Layout, Tensor
from research.pretrained.marian import CONSTANTS, COPIES, KEYS, ONLY, TENSORS, complete

# The first two rows of its tables of positions stand for no position: fairseq counted from the padding token's id on.
_OFFSET = 2
_POSITIONS = Layout(lambda x: [x[_OFFSET:]], lambda x: np.pad(x, [(_OFFSET, 0), (0, 0)]))


def _embeddings(side: str) -> list[Tensor]:
    """The names of a side's parameters before its layers."""
    return [
        Tensor((f"position_{side}/embedding",), f"model.{side}.embed_positions.weight", _POSITIONS),
        *family.norm(f"norm_in_{side}", f"model.{side}.layernorm_embedding"),
    ]


FAMILY = Family(
    prefix="model.",
    kinds={
        "encoder_decoder": Kind(
            architecture="BartForConditionalGeneration",
            model=EncoderDecoder,
            parts={},
            keys=KEYS
            | {
                "vocab_size": Key("vocab_size", 50265),
                "max_positions": Key("max_position_embeddings", 1024),
                "initializer_range": Key("init_std", 0.02, free=True),
            },
            constants=CONSTANTS | {"positions": "learned", "embedding_norm": True},
            complete=complete,
            more=lambda fields: {"is_encoder_decoder": True, "tie_word_embeddings": True},
            defaults={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
        )
    },
    tensors=[*TENSORS, *_embeddings("encoder"), *_embeddings("decoder")],
    copies=COPIES,
    only=ONLY | {"normalize_embedding": True, "static_position_embeddings": False},
    unused=[
        r"model\.(encoder|decoder)\.(embed_tokens\.weight|version)",
        r"lm_head\.weight",
        r"classification_head\..*",  # some were fine-tuned to classify as well
    ],
)
