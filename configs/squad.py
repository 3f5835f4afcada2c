"""Fine-tunes BERT on SQuAD, which asks questions whose answer is a span of a passage of Wikipedia.

Version 1.1 (Rajpurkar 2016), or with `:v2` version 2 (Rajpurkar 2018), where half of the questions of the development
set have no answer. Recipe: that of BERT's repository: learning rate 3e-5, batch 12, 2 epochs, windows of 384 tokens,
10 % of warm-up, weight decay 0.01. Here windows share 128 tokens of the passage, as in Transformers; in the repository
they begin 128 tokens apart.

Published, on the development set of v1.1: exact match 81.25, F1 88.41 percent (BERT-base, uncased; the repository's
README). For v2 no number of this model is quoted here; `best_f1` is at the threshold that suits the set best. Not run
here: the data and the weights need the network.
Hardware: one accelerator with 12 GB; about an hour, v2 half as much again.
`:tiny` and `:v2-tiny` need neither network nor files and take seconds.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import choose, tiny_questions


def get_config(variant: str = "") -> ConfigDict:
    path, dataset = FieldReference("hf://google-bert/bert-base-uncased"), FieldReference("squad/v1.1")

    def data(split: str) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=dict(call="research.data.source.tfds", dataset=dataset, split=split),
            ops=[
                dict(
                    call="research.data.question_answering.Windows",
                    max_length=max_length,
                    stride=stride,
                    max_question_length=64,
                )
            ],
            features=("input_ids", "attention_mask", "token_type_ids", "context_mask", "start", "end"),
        )

    max_length, stride = FieldReference(384), FieldReference(128)
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 12
    config.num_epochs = 2.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.question_answering.QuestionAnswering",
        model=dict(call="research.pretrained.huggingface.load_model", path=path, kind="question_answerer"),
        max_answer_length=30,
        n_best=20,
        null_threshold=placeholder(float),
    )
    config.init = dict(path=path, new_head=False)
    config.data = data("train")
    config.evals = dict(validation=dict(call="research.evaluators.squad.Squad", data=data("validation")))
    config.optimizer = dict(learning_rate=3e-5, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def v2(config: ConfigDict) -> ConfigDict:
    config.data.source.dataset = "squad/v2.0"
    config.task.null_threshold = 0.0
    return config


VARIANTS = {
    "": lambda config: config,
    "v2": v2,
    "tiny": tiny_questions,
    "v2-tiny": lambda config: tiny_questions(v2(config), unanswerable=True),
}
