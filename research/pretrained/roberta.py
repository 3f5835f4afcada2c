"""RoBERTa (Liu 2019) in Hugging Face's format."""

from research.models import bert
from research.pretrained import family
from research.pretrained.bert import ENCODER_KEYS, HEAD_DROPOUT, ONLY, encoder_tensors, prediction_tensors
from research.pretrained.family import Family, Key, Kind

_KEYS = ENCODER_KEYS | {"vocab_size": Key("vocab_size", 50265), "position_offset": Key("pad_token_id", 1)}

FAMILY = Family(
    prefix="roberta.",
    kinds={
        "sequence_classifier": Kind(
            architecture="RobertaForSequenceClassification",
            model=bert.SequenceClassifier,
            parts={"encoder": bert.Encoder},
            keys=_KEYS | {"head_input_dropout": HEAD_DROPOUT, "head_dropout": HEAD_DROPOUT},
            constants={"head_activation": "tanh"},
            tensors=[
                *family.linear("head_dense", "classifier.dense", part="head"),
                *family.linear("head_output", "classifier.out_proj", part="head"),
            ],
        ),
        "masked_lm": Kind(
            architecture="RobertaForMaskedLM",
            model=bert.MaskedLM,
            parts={"encoder": bert.Encoder},
            keys=_KEYS | {"tie_embeddings": Key("tie_word_embeddings", True)},
            constants={"head_activation": "gelu"},
            tensors=prediction_tensors("lm_head", "dense", "layer_norm"),
        ),
        "question_answerer": Kind(
            architecture="RobertaForQuestionAnswering",
            model=bert.QuestionAnswerer,
            parts={"encoder": bert.Encoder},
            keys=_KEYS,
            constants={"num_outputs": 2},
            tensors=family.linear("head_output", "qa_outputs", part="head"),
        ),
        "token_classifier": Kind(
            architecture="RobertaForTokenClassification",
            model=bert.TokenClassifier,
            parts={"encoder": bert.Encoder},
            keys=_KEYS | {"head_dropout": HEAD_DROPOUT},
            constants={},
            tensors=family.linear("head_output", "classifier", part="head"),
        ),
    },
    tensors=encoder_tensors("roberta."),
    only=ONLY,
    unused=[r"roberta\.embeddings\.(position_ids|token_type_ids)", r"roberta\.pooler\..*"],
)
