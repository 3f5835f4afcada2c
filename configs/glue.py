"""Fine-tunes BERT on one of the nine tasks of GLUE (Wang 2018) and scores its development set: configs/glue.py:TASK.

The recipe is that of BERT (Devlin 2018, section A.3): batch 32, AdamW at 2e-5 warming up over a tenth of the run and
falling linearly to 0, weight decay 0.01, 128 tokens, 3 epochs (5 for the small MRPC and WNLI).

Published, of bert-base-cased on the development sets (from the README of Transformers' text-classification example,
which trains without warm-up and weight decay), and what is scored, in percent. Not run here: the data and the weights
need the hub.

  cola   Matthews correlation             56.53
  sst2   accuracy                         92.32
  mrpc   F1 / accuracy                    88.85 / 84.07
  stsb   Pearson / Spearman correlation   88.64 / 88.48
  qqp    accuracy / F1                    90.71 / 87.49
  mnli   accuracy, matched / mismatched   83.91 / 84.10
  qnli   accuracy                         90.66
  rte    accuracy                         65.70
  wnli   accuracy                         none is quoted: the task is a puzzle that no such recipe solves

For orientation, BERT-base on the test sets (Devlin 2018, table 1; checked against transcriptions only): MNLI 84.6/83.4,
QQP 71.2, QNLI 90.5, SST-2 93.5, CoLA 52.1, STS-B 85.8, MRPC 88.9, RTE 66.4.
Hardware: one accelerator; minutes, for MNLI and QQP an hour or more.
`:TASK-tiny`, and `:tiny` for sst2's, needs neither network nor files and takes seconds.
"""

import functools

from ml_collections import ConfigDict, FieldReference

from research.configuration.variants import choose, tiny_text_data, tiny_text_model

ENCODER = "hf://google-bert/bert-base-cased"
# Task -> its texts, its official scores, its classes (none in STS-B, which is a regression), the epochs.
TASKS = {
    "cola": (("sentence",), ("matthews",), ("unacceptable", "acceptable"), 3.0),
    "sst2": (("sentence",), ("accuracy",), ("negative", "positive"), 3.0),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1"), ("not_equivalent", "equivalent"), 5.0),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearman"), (), 3.0),
    "qqp": (("question1", "question2"), ("accuracy", "f1"), ("not_duplicate", "duplicate"), 3.0),
    "mnli": (("premise", "hypothesis"), ("accuracy",), ("entailment", "neutral", "contradiction"), 3.0),
    "qnli": (("question", "sentence"), ("accuracy",), ("entailment", "not_entailment"), 3.0),
    "rte": (("sentence1", "sentence2"), ("accuracy",), ("entailment", "not_entailment"), 3.0),
    "wnli": (("sentence1", "sentence2"), ("accuracy",), ("not_entailment", "entailment"), 5.0),
}
EVALS = {"mnli": ("validation_matched", "validation_mismatched")}


def get_config(variant: str = "") -> ConfigDict:
    return choose(variant, VARIANTS, ConfigDict())


def recipe(config: ConfigDict, task: str) -> ConfigDict:
    fields, scores, labels, num_epochs = TASKS[task]
    path, max_length = FieldReference(ENCODER), FieldReference(128)

    def data(split: str) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=dict(call="research.data.source.tfds", dataset=f"glue/{task}", split=split),
            ops=[dict(call="research.data.text.Tokenize", fields=fields, max_length=max_length)],
            features=("input_ids", "attention_mask", "token_type_ids", "label"),
        )

    config.seed = 0
    config.batch_size = 32
    config.num_epochs = num_epochs
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.classification.Classification",
        objective="softmax" if labels else "regression",
        model=dict(call="research.pretrained.huggingface.sequence_classifier", path=path),
    )
    config.init = dict(path=path, new_head=False)
    config.data = data("train")
    config.evals = {
        split: dict(call="research.evaluators.classification.Scores", scores=scores, data=data(split))
        for split in EVALS.get(task, ("validation",))
    }
    config.optimizer = dict(learning_rate=2e-5, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=0)
    return config


def tiny(config: ConfigDict, task: str) -> ConfigDict:
    fields, _, labels, _ = TASKS[task]
    return tiny_text_data(tiny_text_model(recipe(config, task)), labels, fields)


VARIANTS = {task: functools.partial(recipe, task=task) for task in TASKS}
VARIANTS |= {f"{task}-tiny": functools.partial(tiny, task=task) for task in TASKS}
VARIANTS |= {"tiny": VARIANTS["sst2-tiny"]}
