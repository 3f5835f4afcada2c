"""Grokking: a transformer memorises half of a table of modular division, and understands it long after (Power 2022).

Data: all a / b = c modulo 97, half of them to train, the other half to validate. Model: 2 layers, 128 wide, 4 heads.
It begins with activations of unit variance: from the smaller numbers that language models begin with
(initializer_range 0.02) it understands at once, without memorising first.
Recipe: AdamW at 1e-3, weight decay 1, betas 0.9 and 0.98, warm-up over 10 steps, batches of 512 (Power 2022, A.1.2).
Published: training accuracy is near perfect at less than 1,000 steps, validation accuracy follows between 100,000 and
1,000,000 with little weight decay (figure 1); with weight decay 1 it takes a small part of that (figure 2).
Expected: validation accuracy of 99 % within 3,000 steps, some 2,000 after training accuracy; see experiments/grokking.
Hardware: 2 CPU cores, ten minutes. `:tiny` (modulo 11) takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 512
    config.num_steps = 3000
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(
            call="research.models.gpt.Decoder",
            vocab_size=99,
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
            max_positions=4,
            tie_embeddings=False,
            initializer_range=None,
            unroll=2,
        ),
    )
    config.data = data("train", 97)
    config.evals = dict(
        train=dict(call="research.evaluators.means.Means", data=data("train", 97)),
        validation=dict(call="research.evaluators.means.Means", data=data("validation", 97)),
    )
    config.optimizer = dict(
        learning_rate=1e-3,
        schedule="constant",
        warmup=10,
        b2=0.98,
        weight_decay=1.0,
        no_decay=(),
        clip_norm=None,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=25, evaluate_every_steps=100)
    return choose(variant, VARIANTS, config)


def data(split: str, modulus: int) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.algorithmic.modular_arithmetic", modulus=modulus, split=split),
        features=("input_ids", "targets", "target_mask"),
    )


def tiny(config: ConfigDict) -> ConfigDict:
    config.batch_size = 16
    config.num_steps = 30
    config.task.model.update(vocab_size=13, hidden_size=32, num_heads=2, intermediate_size=64)
    config.data = data("train", 11)
    for split, evaluator in config.evals.items():
        evaluator.data = data(split, 11)
    config.checkpoint.every_steps = 10
    config.log = dict(every_steps=5, evaluate_every_steps=15)
    return config


VARIANTS = {"": lambda config: config, "tiny": tiny}
