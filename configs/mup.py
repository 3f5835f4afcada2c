"""Does the best learning rate move with the width? A small GPT on bytes, in muP and in standard parametrisation.

muP (Yang 2022, "Tensor Programs V", tables 3 and 8, for Adam) is here a set of rules by path and no change to a model:
the learning rate of what maps width to width or to the output (kernels of blocks, the output layer) falls as 1 / width,
relative to a base width of 64; kernels begin with a standard deviation of 1 / sqrt(inputs), and the output layer with
one that falls as 1 / width. Embeddings, biases and norms keep their rate. The width of a head is fixed, so that the
scale of attention does not change with the width.
`:standard` has one rate for all, and an output layer that begins like the other kernels.

    python -m research.main --config=configs/mup.py --config.task.model.hidden_size=256 \
        --config.optimizer.learning_rate=0.004 --workdir=DIR

The other sizes and the rates by path follow `task.model.hidden_size`.
Data: Jane Austen, byte by byte (configs/jane_austen_gpt.py), rows of 128, batches of 8. Model: 2 layers, no weight
decay, 200 steps, a rate that rises for 20 of them and then falls linearly to 0.
Published: figure 1 and section 6.1: in muP the best rate is the same for widths of 128 to 8,192; in standard
parametrisation it falls with the width. Expected: see experiments/mup.
Hardware: 2 CPU cores, 10 seconds (32 wide) to a minute (256 wide). `:tiny` needs neither network nor files and takes
seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, derived, tiny_documents

BASE_WIDTH, HEAD_WIDTH = 64, 32


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 8
    config.num_steps = 200
    config.tokenizer = dict(call="research.data.tokenizer.byte_level")
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(
            call="research.models.gpt.Decoder",
            hidden_size=BASE_WIDTH,
            num_layers=2,
            head_width=HEAD_WIDTH,
            max_positions=128,
            tie_embeddings=False,
            initializer_range=None,
            unroll=2,
        ),
    )
    width = config.task.model.get_ref("hidden_size")
    config.task.model.num_heads = derived(width, lambda width: max(width // HEAD_WIDTH, 1), int)
    config.task.model.intermediate_size = derived(width, lambda width: 4 * width, int)
    config.init = dict(
        call="research.configuration.initial.normal",
        deviations=derived(width, lambda width: (("^head/kernel$", BASE_WIDTH**0.5 / width),), tuple),
    )
    config.data = data("train")
    config.evals = dict(
        validation=dict(call="research.evaluators.means.Means", data=data("validation")),
    )
    config.optimizer = dict(
        learning_rate=4e-3,
        schedule="linear",
        warmup=20,
        b2=0.95,
        clip_norm=None,
        learning_rate_multipliers=derived(width, multipliers, tuple),
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=10, evaluate_every_steps=0)
    return choose(variant, VARIANTS, config)


def multipliers(width: int) -> tuple[tuple[str, float], ...]:
    """Return the factors of the learning rate by path: 1 / width of matrices whose inputs grow with the width."""
    return ((r"layers/.*/kernel$", BASE_WIDTH / width), (r"^head/kernel$", BASE_WIDTH / width))


def data(split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="jane_austen", split=split),
        ops=[dict(call="research.data.language.CausalTokens")],
        features=("input_ids", "targets", "target_mask", "attention_mask", "positions"),
        pack=128,
    )


def standard(config: ConfigDict) -> ConfigDict:
    config.init = None
    config.optimizer.learning_rate_multipliers = ()
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    init = config.init
    config = tiny_documents(config, length=32)
    config.init = init
    return config


VARIANTS = {
    "": lambda config: config,
    "standard": standard,
    "tiny": tiny,
    "standard-tiny": lambda config: standard(tiny(config)),
}
