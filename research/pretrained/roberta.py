"""RoBERTa (Liu 2019) in Hugging Face's format."""

from research.models import bert
from research.pretrained import family
from research.pretrained.bert import ENCODER_KEYS, HEAD_DROPOUT, ONLY, encoder_tensors
from research.pretrained.family import Family, Key, Kind

FAMILY = Family(
    prefix="roberta.",
    kinds={
        "sequence_classifier": Kind(
            architecture="RobertaForSequenceClassification",
            model=bert.SequenceClassifier,
            parts={"encoder": bert.Encoder},
            keys=ENCODER_KEYS
            | {
                "vocab_size": Key("vocab_size", 50265),
                "position_offset": Key("pad_token_id", 1),
                "head_input_dropout": HEAD_DROPOUT,
                "head_dropout": HEAD_DROPOUT,
            },
            constants={"head_activation": "tanh"},
        )
    },
    tensors=[
        *encoder_tensors("roberta."),
        *family.linear("head_dense", "classifier.dense", part="head"),
        *family.linear("head_output", "classifier.out_proj", part="head"),
    ],
    only=ONLY,
    unused=[
        r"roberta\.embeddings\.(position_ids|token_type_ids)",
        r"roberta\.pooler\..*",
        r"lm_head\..*",
        r"qa_outputs\..*",
    ],
)
