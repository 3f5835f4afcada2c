"""Teaches SmolLM2-135M-Instruct which of two words on a film review to prefer: preference tuning by DPO.

Data: the movie-review snippets of configs/movie_snippets.py, and of its test set, which begins with positive ones and
ends with negative ones, 95 of the middle. The prompt asks whether a snippet is positive or negative; the chosen answer
is the right one, the rejected one the other. Reported is the held-out share of pairs whose chosen answer has the
greater reward ("accuracy"), and of those whose chosen answer is the likelier one ("likelier"), the only one of the two
that says something before training, when all rewards are 0.
Weights: SmolLM2-135M-Instruct (Ben Allal 2025) in its 4-bit form, from the Python package registry.
Expected, of one run: likelier rises from 0.57 to 0.83, accuracy from 0.5, as all pairs are equal, to 0.78.
Hardware: 2 CPU cores, 20 minutes, 10 GB of memory.
`:before` takes no step: it measures the weights as they were published. `:simpo` and `:orpo` need no reference. `:tiny`
needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import SMOLLM2, choose, datasets, tiny_decoder, tiny_run, tiny_text_data

LABELS = ("negative", "positive")


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 8
    config.num_steps = 30
    config.tokenizer = dict(call="research.data.tokenizer.load", path=SMOLLM2)
    config.task = dict(
        call="research.tasks.preferences.Preferences",
        objective="dpo",
        beta=0.1,
        model=dict(call="research.pretrained.huggingface.load_model", path=SMOLLM2, kind="causal_lm"),
    )
    config.init = dict(path=SMOLLM2)
    config.data = data("train")
    config.evals = dict(test=dict(call="research.evaluators.means.Means", data=data("test[44%:53%]")))
    config.optimizer = dict(
        learning_rate=1e-5, schedule="linear", warmup=0.1, weight_decay=0.0, clip_norm=1.0, freeze=("^reference/",)
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=5, evaluate_every_steps=0)
    config.decoding = dict(max_new_tokens=16, chat=True)
    return choose(variant, VARIANTS, config)


def data(split: str) -> dict:
    question = 'Is this film review positive or negative? "{text}"'
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="movie_snippets", split=split),
        ops=[
            dict(call="research.data.preferences.ClassPreference", prompt=question, answers=("Negative.", "Positive.")),
            dict(call="research.data.preferences.PreferenceTokens", max_length=128),
        ],
        features=tuple(side + name for side in ("", "rejected_") for name in FEATURES),
        length_buckets=2,
    )


FEATURES = ("input_ids", "targets", "target_mask", "attention_mask")


def before(config: ConfigDict) -> ConfigDict:
    config.num_steps = 0
    return config


def without_reference(objective: str, **settings: float):
    def change(config: ConfigDict) -> ConfigDict:
        config.task.update(objective=objective, **settings)
        config.optimizer.freeze = ()
        return config

    return change


def tiny(config: ConfigDict) -> ConfigDict:
    config = tiny_decoder(config, num_layers=1, max_positions=256)
    config = tiny_run(tiny_text_data(config, LABELS))
    for node in datasets(config):
        node.length_buckets, node.window = 1, 3
        node.ops[1]["max_length"] = 160
    return config


VARIANTS = {
    "": lambda config: config,
    "before": before,
    "simpo": without_reference("simpo", beta=2.0),
    "orpo": without_reference("orpo"),
    "tiny": tiny,
}
