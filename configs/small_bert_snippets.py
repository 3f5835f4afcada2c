"""Does pretraining pay? A small BERT tells positive from negative movie reviews, pretrained on Jane Austen or not.

The same model, word pieces, data and recipe (BERT's, Devlin 2018, section A.3, but for the rate that suits its size):

  pretrained (the default)   begins with what configs/bert_pretraining.py:jane_austen left in runs/bert_jane_austen
                             (--config.init.path is another folder)
  scratch                    begins with random parameters
  tiny                       needs neither network nor files and takes seconds

Expected: see experiments/pretraining_pays. Hardware: 2 CPU cores, 2 minutes.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_text_data, tiny_text_model

LABELS = ("negative", "positive")


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 4.0
    config.tokenizer = dict(  # that of configs/bert_pretraining.py:jane_austen
        call="research.data.tokenizer_training.train",
        source=dict(call="research.data.source.tfds", dataset="jane_austen", split="train"),
        kind="wordpiece",
        vocab_size=4096,
        lowercase=True,
    )
    config.task = dict(
        call="research.tasks.classification.Classification",
        model=dict(
            call="research.models.bert.SequenceClassifier",
            encoder=dict(
                call="research.models.bert.Encoder",
                hidden_size=256,
                num_layers=4,
                num_heads=4,
                intermediate_size=1024,
                max_positions=128,
                initializer_range=0.05,
                sinusoidal_start=True,
                unroll=4,
            ),
            num_outputs=2,
        ),
    )
    config.init = dict(call="research.configuration.transfer.load_params", path="runs/bert_jane_austen", new=("^head",))
    config.data = data(split="train", length_buckets=4)
    test = data(split="test", length_buckets=3)
    config.evals = dict(test=dict(call="research.evaluators.classification.Scores", data=test))
    config.optimizer = dict(learning_rate=2e-4, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=300, keep=2)
    config.log = dict(every_steps=25, evaluate_every_steps=297)
    return choose(variant, VARIANTS, config)


def data(split: str, length_buckets: int) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="movie_snippets", split=split),
        ops=[dict(call="research.data.text.Tokenize", fields=["text"], max_length=64)],
        features=["input_ids", "attention_mask", "token_type_ids", "label"],
        length_buckets=length_buckets,
    )


def scratch(config: ConfigDict) -> ConfigDict:
    config.init = None
    return config


VARIANTS = {
    "": lambda config: config,
    "pretrained": lambda config: config,
    "scratch": scratch,
    "tiny": lambda config: tiny_text_data(tiny_text_model(config), LABELS),
}
