"""Losses of small GPTs of several sizes that were trained with the same compute: the data of a scaling law.

The variant is the compute of a run, C = 6 N D for N parameters and D tokens: `:1e11`, `:3e11` (the default) or `:1e12`.
`task.model.hidden_size` gives N, and the number of steps, the rate and the other sizes follow:

    python -m research.main --config=configs/isoflop.py:1e12 --config.task.model.hidden_size=48 --workdir=DIR

Method: Hoffmann 2022, "Training compute-optimal large language models", section 3.2, with a cosine schedule as long as
each run. N counts all parameters. Data: Jane Austen, byte by byte (configs/jane_austen_gpt.py), rows of 128, batches of
8; the smallest model of the largest compute sees them once and a half. Model: 3 layers, 8 to 96 wide.
Expected: see experiments/scaling_law.
Hardware: 2 CPU cores, 20 seconds to 2 minutes a run. `:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, derived, tiny_documents

LAYERS, LENGTH, VOCABULARY, BATCH = 3, 128, 260, 8


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = BATCH
    config.tokenizer = dict(call="research.data.tokenizer.byte_level")
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(
            call="research.models.gpt.Decoder",
            hidden_size=32,
            num_layers=LAYERS,
            head_width=16,
            max_positions=LENGTH,
            unroll=LAYERS,
        ),
    )
    width = config.task.model.get_ref("hidden_size")
    config.task.model.num_heads = derived(width, lambda width: max(width // 16, 1), int)
    config.task.model.intermediate_size = derived(width, lambda width: 4 * width, int)
    config.task.model.initializer_range = derived(width, lambda width: width**-0.5, float)
    config.num_steps = 0  # of the variant
    config.data = data("train")
    config.evals = dict(validation=dict(call="research.evaluators.means.Means", data=data("validation")))
    config.optimizer = dict(
        learning_rate=derived(width, lambda width: 8e-3 * (64 / width) ** 0.5, float),
        schedule="cosine",
        warmup=0.1,
        end_factor=0.1,
        b2=0.95,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=20, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def data(split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="jane_austen", split=split),
        ops=[dict(call="research.data.language.CausalTokens")],
        features=("input_ids", "targets", "target_mask", "attention_mask", "positions"),
        pack=LENGTH,
    )


def parameters(width: int) -> int:
    """Return N: tables of bytes and positions, blocks with biases and norms, and the last norm."""
    return (VOCABULARY + LENGTH) * width + LAYERS * (12 * width**2 + 13 * width) + 2 * width


def budget(compute: float):
    def change(config: ConfigDict) -> ConfigDict:
        width = config.task.model.get_ref("hidden_size")
        tokens = BATCH * LENGTH
        config.num_steps = derived(width, lambda width: round(compute / (6 * parameters(width) * tokens)), int)
        return config

    return change


VARIANTS = {
    "": budget(3e11),
    "1e11": budget(1e11),
    "3e11": budget(3e11),
    "1e12": budget(1e12),
    "tiny": lambda config: tiny_documents(config, length=32),
}
