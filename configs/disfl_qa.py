"""Fine-tunes MiniLM on Disfl-QA, questions of SQuAD 2 as people speak, who correct themselves in the middle.

Data: Gupta (2021), a thousand of its test questions, split by passage: 693 to train, 110 to validate, 197 to test; a
quarter has no answer. Start: all-MiniLM-L6-v2 (6 layers, 384 wide), which has never answered a question; both come from
the Python package registry. Recipe: BERT's for SQuAD with more epochs, as there are few questions, and a higher rate.
Expected: see experiments/disfl_qa. Published scores are of models trained on all of SQuAD 2 and do not compare. To
answer nothing always scores an exact match of about a quarter.
Hardware: 2 CPU cores, about half an hour.
`:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict, FieldReference

from research.configuration.variants import MINILM, choose, tiny_questions


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference(MINILM)
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_epochs = 8.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.question_answering.QuestionAnswering",
        model=dict(call="research.pretrained.huggingface.load_model", path=path, kind="question_answerer"),
        null_threshold=0.0,
    )
    config.init = dict(path=path, new_head=False)
    config.data = data("train")
    config.evals = {
        split: dict(call="research.evaluators.squad.Squad", data=data(split)) for split in ("validation", "test")
    }
    config.optimizer = dict(learning_rate=1e-4, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=100, keep=2)
    config.log = dict(every_steps=10, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def data(split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="disfl_qa", split=split),
        ops=[dict(call="research.data.question_answering.Windows", max_length=384, stride=128)],
        features=("input_ids", "attention_mask", "token_type_ids", "context_mask", "start", "end"),
    )


def tiny(config: ConfigDict) -> ConfigDict:
    return tiny_questions(config, unanswerable=True)


VARIANTS = {"": lambda config: config, "tiny": tiny}
