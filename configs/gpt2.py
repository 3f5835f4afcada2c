"""Pretrains GPT-2 (Radford 2019, table 2) on English web text, with the recipe of nanoGPT.

  small (the default)   12 layers,  768 wide,   124 million parameters
  medium                24 layers, 1024 wide,   355 million
  large                 36 layers, 1280 wide,   774 million
  xl                    48 layers, 1600 wide, 1,558 million
  tiny                  needs neither network nor files and takes seconds

Recipe (nanoGPT, of GPT-2 small): 480 rows of 1,024 tokens a step, 600,000 steps, learning rate 6e-4 to 6e-5 on a
cosine, 2,000 steps of warm-up, weight decay 0.1, betas 0.9 and 0.95, gradients clipped at 1, no dropout. The larger
sizes take the learning rates that GPT-3 has for theirs: 3e-4, 2.5e-4 and 2e-4.
Published: validation loss about 2.85 (small, nanoGPT, on OpenWebText). That text is no dataset of TFDS: this is C4's
English (Raffel 2019, section 2.2), on which losses are others. TFDS prepares C4 with Apache Beam, once.

Not run here. 600,000 steps are 295 billion tokens, about twice C4's English; at 6 operations a parameter and token that
is 2.2e20 (6.3e20, 1.4e21, 2.8e21) floating-point operations: 3 (8, 18, 37) days of 8 A100 at 35 % of their peak of
312e12 a second. The 5 microbatches are for 40 GB each; larger sizes split their parameters over all
devices, and large and xl compute activations again in the backward pass.
"""

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents

# Width, layers, heads, learning rate, whether activations are recomputed.
SIZES = {
    "small": (768, 12, 12, 6e-4, "none"),
    "medium": (1024, 24, 16, 3e-4, "none"),
    "large": (1280, 36, 20, 2.5e-4, "full"),
    "xl": (1600, 48, 25, 2e-4, "full"),
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 480
    config.num_steps = 600_000
    config.tokenizer = dict(call="research.data.tokenizer.load", path="hf://openai-community/gpt2/tokenizer.json")
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(call="research.models.gpt.Decoder", max_positions=1024, dtype="bfloat16"),
    )
    config.data = data("train")
    config.evals = dict(
        validation=dict(
            call="research.evaluators.means.Means", perplexity=True, data=data("validation[:2%]", ("target_bytes",))
        )
    )
    config.optimizer = dict(
        schedule="cosine",
        warmup=2000,
        end_factor=0.1,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        microbatches=5,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(topology="v5e:4x4", vocab_size=50257)
    config.checkpoint = dict(every_steps=2000, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=10_000)
    config.decoding = dict(max_new_tokens=200, temperature=0.8, top_p=0.95)
    return choose(variant, VARIANTS, config)


def data(split: str, more: tuple[str, ...] = ()) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="c4/en", split=split),
        ops=[dict(call="research.data.language.CausalTokens", target_bytes=bool(more))],
        features=("input_ids", "targets", "target_mask", "attention_mask", "positions", *more),
        pack=1024,
    )


def sized(config: ConfigDict, size: str) -> ConfigDict:
    width, layers, heads, learning_rate, remat = SIZES[size]
    config.task.model.update(
        hidden_size=width, num_layers=layers, num_heads=heads, intermediate_size=4 * width, remat=remat
    )
    config.optimizer.learning_rate = learning_rate
    if size != "small":
        config.mesh = dict(data=1, fsdp=-1, model=1)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = sized(config, "small")
    config.task.model.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=32)
    config.task.model.dtype = "float32"
    config.optimizer.microbatches = 1
    return tiny_documents(config, length=32)


VARIANTS: dict[str, Callable[[ConfigDict], ConfigDict]] = {size: functools.partial(sized, size=size) for size in SIZES}
VARIANTS |= {"": VARIANTS["small"], "tiny": tiny}
