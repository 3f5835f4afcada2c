"""Induction heads: two layers learn to go on with what is repeated, one layer does not (Olsson 2022).

An induction head finds the token that stands where the present one stood before, one place further: it needs a head of
an earlier layer that tells each place what came before it. So a transformer of two layers can predict repeated random
tokens, and one of one layer cannot (Olsson 2022, arguments 1 and 2; Elhage 2021).
Data: 64 random tokens of 64 kinds that begin again after 8 to 56 of them; counted are the repeated ones, of which
chance predicts 1 in 64. Model: attention and MLPs, 64 wide, 4 heads, rotary positions, so that no place is known by its
number.
Recipe: AdamW at 3e-3, 600 steps of 64 sequences.
Published: the ability appears in a short window of training, together with the heads, in models of two layers or more;
models of one layer never show it (figures of arguments 1 and 2). Expected: see experiments/induction_heads.
Hardware: 2 CPU cores, a minute. `:one_layer` has one layer, and is 96 wide, so that it has as many parameters.
`:tiny` takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.num_steps = 600
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(
            call="research.models.gpt.Decoder",
            vocab_size=64,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=256,
            positions="rotary",
            tie_embeddings=False,
            initializer_range=None,
            unroll=2,
        ),
    )
    config.data = data(seed=0)
    config.evals = dict(test=dict(call="research.evaluators.means.Means", data=data(seed=1, count=512)))
    config.optimizer = dict(
        learning_rate=3e-3, schedule="constant", warmup=50, b2=0.98, weight_decay=0.01, clip_norm=1.0
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=25, evaluate_every_steps=25)
    return choose(variant, VARIANTS, config)


def data(seed: int, **sizes: int) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.repetition.repeated_tokens", seed=seed, **sizes),
        features=("input_ids", "targets", "target_mask"),
    )


def one_layer(config: ConfigDict) -> ConfigDict:
    config.task.model.update(num_layers=1, hidden_size=96, intermediate_size=384, unroll=1)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.batch_size = 16
    config.num_steps = 30
    config.task.model.update(hidden_size=32, num_heads=2, intermediate_size=64)
    config.data = data(seed=0, count=64, vocab_size=4, length=16, shortest=4)
    config.evals.test.data = data(seed=1, count=16, vocab_size=4, length=16, shortest=4)
    config.optimizer.update(warmup=0, learning_rate=1e-2)
    config.checkpoint.every_steps = 10
    config.log = dict(every_steps=5, evaluate_every_steps=15)
    return config


VARIANTS = {"": lambda config: config, "one_layer": one_layer, "tiny": tiny}
