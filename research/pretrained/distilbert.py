"""DistilBERT (Sanh 2019) in Hugging Face's format."""

from research.models import bert
from research.pretrained import family
from research.pretrained.family import Family, Key, Kind, Tensor

_LAYER = "distilbert.transformer.layer.{}."

_KEYS = {
    "vocab_size": Key("vocab_size", 30522),
    "hidden_size": Key("dim", 768, fallback="hidden_size"),
    "num_layers": Key("n_layers", 6, fallback="num_hidden_layers"),
    "num_heads": Key("n_heads", 12, fallback="num_attention_heads"),
    "intermediate_size": Key("hidden_dim", 3072),
    "max_positions": Key("max_position_embeddings", 512),
    "activation": Key("activation", "gelu"),
    "dropout": Key("dropout", 0.1, free=True),
    "attention_dropout": Key("attention_dropout", 0.1, free=True),
    "initializer_range": Key("initializer_range", 0.02, free=True),
}
_CONSTANTS = {"num_token_types": 0, "position_offset": None, "layer_norm_epsilon": 1e-12}

FAMILY = Family(
    prefix="distilbert.",
    kinds={
        "sequence_classifier": Kind(
            architecture="DistilBertForSequenceClassification",
            model=bert.SequenceClassifier,
            parts={"encoder": bert.Encoder},
            keys=_KEYS | {"head_dropout": Key("seq_classif_dropout", 0.2, free=True)},
            constants=_CONSTANTS | {"head_activation": "relu", "head_input_dropout": 0.0},
            tensors=[
                *family.linear("head_dense", "pre_classifier", part="head"),
                *family.linear("head_output", "classifier", part="head"),
            ],
        ),
        "masked_lm": Kind(
            architecture="DistilBertForMaskedLM",
            model=bert.MaskedLM,
            parts={"encoder": bert.Encoder},
            keys=_KEYS
            | {"head_activation": Key("activation", "gelu"), "tie_embeddings": Key("tie_word_embeddings", True)},
            constants=_CONSTANTS,
            tensors=[
                *family.linear("head_dense", "vocab_transform", part="head"),
                *family.norm("head_norm", "vocab_layer_norm", part="head"),
                Tensor(("head_bias",), "vocab_projector.bias", part="head"),
                Tensor(("head_output/kernel",), "vocab_projector.weight", family.TRANSPOSED, part="head"),
            ],
        ),
        "question_answerer": Kind(
            architecture="DistilBertForQuestionAnswering",
            model=bert.QuestionAnswerer,
            parts={"encoder": bert.Encoder},
            keys=_KEYS | {"head_dropout": Key("qa_dropout", 0.1, free=True)},
            constants=_CONSTANTS | {"num_outputs": 2},
            tensors=family.linear("head_output", "qa_outputs", part="head"),
        ),
        "token_classifier": Kind(
            architecture="DistilBertForTokenClassification",
            model=bert.TokenClassifier,
            parts={"encoder": bert.Encoder},
            keys={"head_dropout": Key("dropout", 0.1, free=True)} | _KEYS,
            constants=_CONSTANTS,
            tensors=family.linear("head_output", "classifier", part="head"),
        ),
    },
    tensors=[
        *family.embedding("encoder/embeddings/word", "distilbert.embeddings.word_embeddings"),
        *family.embedding("encoder/embeddings/position", "distilbert.embeddings.position_embeddings"),
        *family.norm("encoder/embeddings/norm", "distilbert.embeddings.LayerNorm"),
        *family.linear("encoder/layers/attention/query", _LAYER + "attention.q_lin"),
        *family.linear("encoder/layers/attention/key", _LAYER + "attention.k_lin"),
        *family.linear("encoder/layers/attention/value", _LAYER + "attention.v_lin"),
        *family.linear("encoder/layers/attention/out", _LAYER + "attention.out_lin"),
        *family.norm("encoder/layers/attention_norm", _LAYER + "sa_layer_norm"),
        *family.linear("encoder/layers/mlp/up", _LAYER + "ffn.lin1"),
        *family.linear("encoder/layers/mlp/down", _LAYER + "ffn.lin2"),
        *family.norm("encoder/layers/mlp_norm", _LAYER + "output_layer_norm"),
    ],
    # `sinusoidal_pos_embds` only says how the table of positions was first filled; the checkpoint holds the table.
    only={"pruned_heads": {}, "per_layer_config": {}, "quantization_config": {}},
    unused=[r"distilbert\.embeddings\.position_ids"],
)
