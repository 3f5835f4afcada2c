"""Does pretraining pay? A small BERT tells positive from negative movie reviews, pretrained on Jane Austen or not.

The same model, word pieces, data and recipe (BERT's, Devlin 2018, section A.3, but for the rate that suits its size):

  pretrained (the default)   begins with what configs/bert_pretraining.py:jane_austen left in runs/bert_jane_austen
                             (--config.init.path is another folder)
  scratch                    begins with random parameters
  tiny                       needs neither network nor files and takes seconds

Expected: see experiments/pretraining_pays. Hardware: 2 CPU cores, 2 minutes.
"""

from ml_collections import ConfigDict

from configs.bert_pretraining import SMALL, jane_austen
from configs.bert_pretraining import get_config as pretraining
from configs.movie_snippets import LABELS, data
from research.variants import choose, tiny_text_data, tiny_text_model


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 4.0
    config.tokenizer = jane_austen(pretraining()).tokenizer
    config.task = dict(
        call="research.tasks.classification.Classification",
        model=dict(
            call="research.models.bert.SequenceClassifier",
            encoder=dict(call="research.models.bert.Encoder", **SMALL),
            num_outputs=2,
        ),
    )
    config.init = dict(call="research.transfer.load_params", path="runs/bert_jane_austen", new=("^head",))
    config.data = data(split="train", length_buckets=4)
    test = data(split="test", length_buckets=3)
    config.evals = dict(test=dict(call="research.evaluators.classification.Scores", data=test))
    config.optimizer = dict(learning_rate=2e-4, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=300, keep=2)
    config.log = dict(every_steps=25, evaluate_every_steps=297)
    return choose(variant, VARIANTS, config)


def scratch(config: ConfigDict) -> ConfigDict:
    config.init = None
    return config


VARIANTS = {
    "": lambda config: config,
    "pretrained": lambda config: config,
    "scratch": scratch,
    "tiny": lambda config: tiny_text_data(tiny_text_model(config), LABELS),
}
