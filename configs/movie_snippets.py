"""Fine-tunes all-MiniLM-L6-v2 to tell positive from negative movie reviews.

Data: the movie-review snippets of VADER (Hutto & Gilbert 2014), 9,509 to train and 1,057 to test; weights and data come
from the Python package registry. The recipe is the usual one for BERT (Devlin 2018, section A.3).
Expected: test accuracy 85 to 86 %, of any seed; TF-IDF and logistic regression reach 78 %.
Hardware: 2 CPU cores, 3 to 5 minutes.
`:lora` trains low-rank adapters and the head alone. `:qlora`, `:dora`, `:ia3`, `:prompt` and `:bias` are
other ways to train little beside the head: low-rank adapters on a base in 4 bits (Dettmers 2023), or with magnitudes,
vectors that multiply activations, a prompt of 20 learned vectors, and the biases (Ben Zaken 2021); what accuracy they
reach was not measured. `:tiny`, and each of these with `-tiny` behind its name, need neither network nor files and take
seconds. --mode=sweep tries three rates with three seeds each.
"""

from typing import Any

from ml_collections import ConfigDict

from research.configuration.sweeps import Sweep, grid, seeds
from research.configuration.variants import MINILM, choose, tiny_text_data, tiny_text_model

LABELS = ("negative", "positive")


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 2.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=MINILM)
    config.task = dict(
        call="research.tasks.classification.Classification",
        model=dict(call="research.pretrained.huggingface.sequence_classifier", path=MINILM, unroll=6),
    )
    config.init = dict(path=MINILM)
    config.data = data(split="train", length_buckets=9)
    test = data(split="test", length_buckets=3)
    config.evals = dict(test=dict(call="research.evaluators.classification.Scores", data=test))
    config.optimizer = dict(
        learning_rate=5e-5, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0, microbatches=1
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=200, keep=2)
    config.log = dict(every_steps=20, evaluate_every_steps=200)
    return choose(variant, VARIANTS, config)


def get_sweep() -> Sweep:
    return grid({"optimizer.learning_rate": (2e-5, 5e-5, 1e-4)}) * seeds(3)


def data(split: str, length_buckets: int) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="movie_snippets", split=split),
        ops=[dict(call="research.data.text.Tokenize", fields=["text"], max_length=64)],
        features=["input_ids", "attention_mask", "token_type_ids", "label"],
        length_buckets=length_buckets,
    )


def lora(config: ConfigDict, **settings: Any) -> ConfigDict:
    """Train low-rank matrices beside the frozen attention and MLP kernels, and the new head as it is."""
    targets = ["layers/.*/kernel$"]
    return adapted(config, 1e-3, call="research.tasks.lora.LoRA", rank=8, alpha=16.0, targets=targets, **settings)


def ia3(config: ConfigDict) -> ConfigDict:
    """Train vectors that multiply keys, values and the MLP's hidden activations, and the new head as it is."""
    targets, feedforward = ["layers/attention/(key|value)/kernel$"], ["layers/mlp/down/kernel$"]
    return adapted(config, 3e-3, call="research.tasks.ia3.IA3", targets=targets, feedforward=feedforward)


def prompt(config: ConfigDict) -> ConfigDict:
    """Train vectors before the text, and the new head as it is."""
    return adapted(config, 1e-2, call="research.tasks.prompt_tuning.PromptTuning", length=20)


def adapted(config: ConfigDict, learning_rate: float, **task: Any) -> ConfigDict:
    config.task = dict(task, task=config.task.to_dict(), whole=["^head_"])
    config.optimizer.update(learning_rate=learning_rate, freeze=["^base/"])
    return config


def bias(config: ConfigDict) -> ConfigDict:
    """Train the biases (Ben Zaken 2021), and the new head as it is."""
    config.optimizer.update(learning_rate=1e-3, freeze=["^(?!head_).*(?<!/bias)$"])
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    return tiny_text_data(tiny_text_model(config), LABELS)


def dora(config: ConfigDict) -> ConfigDict:
    return lora(config, dora=True)


def tiny_prompt(config: ConfigDict) -> ConfigDict:
    config = prompt(tiny(config))
    config.task.task.model.encoder.max_positions = 64  # for the vectors too
    return config


def tiny_bias(config: ConfigDict) -> ConfigDict:
    config = bias(tiny(config))
    config.optimizer.learning_rate, config.num_epochs = 1e-2, 20.0  # what is frozen was never trained
    return config


VARIANTS = {
    "": lambda config: config,
    "tiny": tiny,
    "lora": lora,
    "lora-tiny": lambda config: lora(tiny(config)),
    "qlora": lambda config: lora(config, base_format="nf4"),
    "qlora-tiny": lambda config: lora(tiny(config), base_format="nf4"),
    "dora": dora,
    "dora-tiny": lambda config: dora(tiny(config)),
    "ia3": ia3,
    "ia3-tiny": lambda config: ia3(tiny(config)),
    "prompt": prompt,
    "prompt-tiny": tiny_prompt,
    "bias": bias,
    "bias-tiny": tiny_bias,
}
