r"""Fine-tunes a published encoder on your own table of texts and labels: CSV, TSV, JSON lines or Parquet.

  python -m research.main --config=configs/finetune_text.py --workdir=runs/reviews \
      --config.data.source.train=reviews.csv --config.data.source.text=review --config.data.source.label=stars

Each of these is said once and holds everywhere:
  --config.data.source.train     the file; one row in ten is held out and evaluated on
  --config.data.source.test      a file to evaluate on instead
  --config.data.source.held_out  another share than 0.1 (none with a test file)
  --config.data.source.text      the column of text, or two for pairs: question,answer
  --config.data.source.label     the column of labels
  --config.data.source.kind      classification; multi_label (any number of labels a row); regression (numbers)
  --config.init.path             the encoder: hf://ORG/NAME, a folder, or what --mode=export wrote
  --config.init.new_head=true    start from a classifier of other labels
  --config.data.ops[0].max_length  tokens a text, at most

The number and the names of the classes come from the training file, what is evaluated from `kind`. BERT, RoBERTa and
DistilBERT are known: hf://FacebookAI/roberta-base, hf://distilbert/distilbert-base-uncased.
Recipe: the usual one for BERT (Devlin 2018, section A.3). Expected: depends on the table.
Hardware: any; BERT-base wants an accelerator, or patience. `:minilm` is six times smaller, and comes from the package
registry where the hub cannot be reached. `:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import MINILM, choose, derived, tiny_text_data, tiny_text_model

OBJECTIVES = {"classification": "softmax", "multi_label": "sigmoid", "regression": "regression"}
SCORES = {
    "classification": ("accuracy", "macro_f1"),
    "multi_label": ("accuracy", "micro_f1", "macro_f1"),
    "regression": ("pearson", "spearman"),
}


def get_config(variant: str = "") -> ConfigDict:
    path, kind = FieldReference("hf://google-bert/bert-base-uncased"), FieldReference("classification")
    test, max_length = FieldReference(""), FieldReference(128)
    table = dict(
        call="research.data.source.table",
        train=placeholder(str),
        test=test,
        held_out=derived(test, lambda file: 0.0 if file else 0.1, float),
        text=FieldReference(("text",)),
        label=FieldReference("label"),
        kind=kind,
        labels=FieldReference(()),
        separator=FieldReference(","),
        columns=FieldReference(()),
        quoted=placeholder(bool),
    )

    def data(split: str | FieldReference) -> dict:
        two = derived(table["text"], lambda columns: ("text", "text_pair")[: len(columns)], tuple)
        return dict(
            call="research.data.dataset.Dataset",
            source=table | dict(split=split),
            ops=[dict(call="research.data.text.Tokenize", fields=two, max_length=max_length)],
            features=("input_ids", "attention_mask", "token_type_ids", "label"),
        )

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 3.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.classification.Classification",
        objective=derived(kind, lambda kind: OBJECTIVES.get(kind, kind), str),
        model=dict(call="research.pretrained.huggingface.sequence_classifier", path=path),
    )
    config.init = dict(path=path, new_head=False)
    config.data = data("train")
    config.evals = dict(
        test=dict(
            call="research.evaluators.classification.Scores",
            scores=derived(kind, lambda kind: SCORES.get(kind, ()), tuple),
            data=data(derived(test, lambda file: "test" if file else "validation", str)),
        )
    )
    config.optimizer = dict(learning_rate=2e-5, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def minilm(config: ConfigDict) -> ConfigDict:
    config.init.path = MINILM
    config.optimizer.learning_rate = 5e-5
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    return tiny_text_data(tiny_text_model(config), labels=("negative", "positive"))


VARIANTS = {"": lambda config: config, "minilm": minilm, "tiny": tiny}
