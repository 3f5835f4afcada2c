"""BERT (Devlin 2018) in Hugging Face's format."""

from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.models import bert
from research.pretrained import family
from research.pretrained.family import Computed, Family, Key, Kind


def _token_types(config: Mapping[str, Any]) -> Any:
    types = Key("type_vocab_size", 2).read(config)
    if types == 0:
        raise UserError("config.json has type_vocab_size=0, where BERT and RoBERTa have one token type at least")
    return types


ENCODER_KEYS: dict[str, Key | Computed] = {
    "vocab_size": Key("vocab_size", 30522),
    "hidden_size": Key("hidden_size", 768),
    "num_layers": Key("num_hidden_layers", 12),
    "num_heads": Key("num_attention_heads", 12),
    "intermediate_size": Key("intermediate_size", 3072),
    "max_positions": Key("max_position_embeddings", 512),
    "num_token_types": Computed(_token_types, lambda value: {"type_vocab_size": value}),
    "activation": Key("hidden_act", "gelu"),
    "layer_norm_epsilon": Key("layer_norm_eps", 1e-12),
    "dropout": Key("hidden_dropout_prob", 0.1, free=True),
    "attention_dropout": Key("attention_probs_dropout_prob", 0.1, free=True),
    "initializer_range": Key("initializer_range", 0.02, free=True),
}
HEAD_DROPOUT = Key("classifier_dropout", 0.1, fallback="hidden_dropout_prob", free=True)
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "quantization_config": {},
}


def encoder_tensors(prefix: str) -> list[family.Tensor]:
    """The names of an encoder with token types, as BERT and RoBERTa have it."""
    layer = prefix + "encoder.layer.{}."
    return [
        *family.embedding("encoder/embeddings/word", f"{prefix}embeddings.word_embeddings"),
        *family.embedding("encoder/embeddings/position", f"{prefix}embeddings.position_embeddings"),
        *family.embedding("encoder/embeddings/token_type", f"{prefix}embeddings.token_type_embeddings"),
        *family.norm("encoder/embeddings/norm", f"{prefix}embeddings.LayerNorm"),
        *family.linear("encoder/layers/attention/query", f"{layer}attention.self.query"),
        *family.linear("encoder/layers/attention/key", f"{layer}attention.self.key"),
        *family.linear("encoder/layers/attention/value", f"{layer}attention.self.value"),
        *family.linear("encoder/layers/attention/out", f"{layer}attention.output.dense"),
        *family.norm("encoder/layers/attention_norm", f"{layer}attention.output.LayerNorm"),
        *family.linear("encoder/layers/mlp/up", f"{layer}intermediate.dense"),
        *family.linear("encoder/layers/mlp/down", f"{layer}output.dense"),
        *family.norm("encoder/layers/mlp_norm", f"{layer}output.LayerNorm"),
    ]


def prediction_tensors(head: str, dense: str, norm: str) -> list[family.Tensor]:
    """The names of a masked language model's head, as BERT and RoBERTa have it.

    The bias stands there twice where the output layer has weights of its own, and the second one counts.
    """
    own = "head_output/kernel"
    return [
        *family.linear("head_dense", f"{head}.{dense}", part="head"),
        *family.norm("head_norm", f"{head}.{norm}", part="head"),
        family.Tensor(("head_bias",), f"{head}.bias", part="head"),
        family.Tensor((own,), f"{head}.decoder.weight", family.TRANSPOSED, part="head"),
        family.Tensor(("head_bias",), f"{head}.decoder.bias", part="head", beside=own),
    ]


FAMILY = Family(
    prefix="bert.",
    kinds={
        "sequence_classifier": Kind(
            architecture="BertForSequenceClassification",
            model=bert.SequenceClassifier,
            parts={"encoder": bert.Encoder},
            keys=ENCODER_KEYS | {"head_dropout": HEAD_DROPOUT},
            constants={"position_offset": None, "head_activation": "tanh", "head_input_dropout": 0.0},
            tensors=[
                *family.linear("head_dense", "bert.pooler.dense", part="pooler"),
                *family.linear("head_output", "classifier", part="head"),
            ],
        ),
        "masked_lm": Kind(
            architecture="BertForMaskedLM",
            model=bert.MaskedLM,
            parts={"encoder": bert.Encoder},
            keys=ENCODER_KEYS
            | {"head_activation": Key("hidden_act", "gelu"), "tie_embeddings": Key("tie_word_embeddings", True)},
            constants={"position_offset": None},
            tensors=prediction_tensors("cls.predictions", "transform.dense", "transform.LayerNorm"),
            same_head=["BertForPreTraining"],
        ),
        "question_answerer": Kind(
            architecture="BertForQuestionAnswering",
            model=bert.QuestionAnswerer,
            parts={"encoder": bert.Encoder},
            keys=ENCODER_KEYS,
            constants={"position_offset": None, "num_outputs": 2},
            tensors=family.linear("head_output", "qa_outputs", part="head"),
        ),
        "token_classifier": Kind(
            architecture="BertForTokenClassification",
            model=bert.TokenClassifier,
            parts={"encoder": bert.Encoder},
            keys=ENCODER_KEYS | {"head_dropout": HEAD_DROPOUT},
            constants={"position_offset": None},
            tensors=family.linear("head_output", "classifier", part="head"),
        ),
    },
    tensors=encoder_tensors("bert."),
    only=ONLY,
    unused=[r"bert\.embeddings\.(position_ids|token_type_ids)", r"cls\.seq_relationship\..*"],
)
