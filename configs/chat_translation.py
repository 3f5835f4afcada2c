"""Teaches SmolLM2-135M-Instruct to answer "Translate into German: ..." about LibreOffice's help: instruction tuning.

Data: the first 640 training pairs of configs/libreoffice_translation.py as conversations; the loss is on the answers
alone. What is measured is the perplexity of 200 right answers, and the chrF and BLEU of greedy answers to 40 questions
that neither training nor validation have seen.
Weights: SmolLM2-135M-Instruct (Ben Allal 2025) in its 8-bit form, from the Python package registry.
Expected: see experiments/instruction_tuning. Hardware: 2 CPU cores, a quarter of an hour, 5 GB of memory.
`:before` takes no step: it measures the weights as they were published. `:tiny` needs neither network nor files and
takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import SMOLLM2, choose, tiny_decoder, tiny_documents


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 8
    config.num_steps = 80
    config.tokenizer = dict(call="research.data.tokenizer.load", path=SMOLLM2)
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(call="research.pretrained.huggingface.load_model", path=SMOLLM2, kind="causal_lm"),
    )
    config.init = dict(path=SMOLLM2)
    config.data = data("train[:640]", "{target}")
    answers = data("validation[:200]", "{target}")
    questions = data("test[:40]", "", features=("input_ids", "attention_mask"))
    config.evals = dict(
        validation=dict(call="research.evaluators.means.Means", perplexity=True, data=answers),
        test=dict(call="research.evaluators.generation.Generation", data=questions, scores=("chrf", "bleu")),
    )
    config.optimizer = dict(learning_rate=1e-4, schedule="linear", warmup=0.1, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=5, evaluate_every_steps=0)
    config.decoding = dict(max_new_tokens=96, chat=True)
    return choose(variant, VARIANTS, config)


def data(split: str, assistant: str, features: tuple[str, ...] = ()) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="libreoffice/en-de", split=split),
        ops=[
            dict(call="research.data.chat.Messages", user="Translate into German: {source}", assistant=assistant),
            dict(call="research.data.chat.ChatTokens", max_length=256),
        ],
        features=features or ("input_ids", "targets", "target_mask", "attention_mask"),
        length_buckets=2,
    )


def before(config: ConfigDict) -> ConfigDict:
    config.num_steps = 0
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = tiny_decoder(config, num_layers=1, max_positions=128)
    config = tiny_documents(config, length=120, fields=("source", "target"))
    return config


VARIANTS = {"": lambda config: config, "before": before, "tiny": tiny}
