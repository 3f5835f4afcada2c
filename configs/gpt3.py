"""Pretrains the eight sizes of GPT-3 (Brown 2020, table 2.1) on English web text: configs/gpt3.py:SIZE.

  size   layers  width  heads  tokens a step  learning rate     operations
  125M       12    768     12            0.5 M        6.0e-4        2.3e20
  350M       24   1024     16            0.5 M        3.0e-4        6.4e20
  760M       24   1536     16            0.5 M        2.5e-4        1.4e21
  1.3B       24   2048     16              1 M        2.0e-4        2.4e21
  2.7B       32   2560     32              1 M        1.6e-4        4.8e21
  6.7B       32   4096     32              2 M        1.2e-4        1.2e22
  13B        40   5120     40              2 M        1.0e-4        2.3e22
  175B       96  12288     96            3.2 M        0.6e-4        3.1e23

The table is checked against transcriptions only, of 2.7B, 6.7B and 13B it is from memory. It prints 24 heads of 128 for
1.3B and a width of 5,140 for 13B, which make neither the width nor the size: here they are 16 and 5,120. Recipe
(appendix B): 300 billion tokens in rows of 2,048, 375 million of them to warm up, weight decay 0.1, betas 0.9 and 0.95,
gradients clipped at 1, a cosine to 10 %: there over 260 billion tokens and level from then on, here over the whole run.
All layers are dense, where the paper's alternate with locally banded sparse ones; the batch does not grow at the
beginning.

Not run here. `operations` are 6 a parameter and token, each of 300 billion tokens. At 35 % of an H100's peak of 989e12
a second 8 of them take 1 day for 125M, 10 days for 1.3B and 97 days for 13B, 1,024 of them 10 days for 175B. From 1.3B
on parameters are split over all devices and activations are computed again in the backward pass. C4's English, which
TFDS prepares with Apache Beam, once, holds about half as many tokens; the paper's text is not published, so that its
losses are not to be compared.
`:tiny` needs neither network nor files and takes seconds.
"""

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents

LENGTH = 2048
# Layers, width, heads, rows a step, learning rate, slice.
SIZES = {
    "125M": (12, 768, 12, 256, 6e-4, "v5e:4x4"),
    "350M": (24, 1024, 16, 256, 3e-4, "v5e:8x8"),
    "760M": (24, 1536, 16, 256, 2.5e-4, "v5p:2x4x4"),
    "1.3B": (24, 2048, 16, 512, 2e-4, "v5p:4x4x4"),
    "2.7B": (32, 2560, 32, 512, 1.6e-4, "v5p:4x4x4"),
    "6.7B": (32, 4096, 32, 1024, 1.2e-4, "v5p:4x4x8"),
    "13B": (40, 5120, 40, 1024, 1e-4, "v5p:4x4x8"),
    "175B": (96, 12288, 96, 1536, 0.6e-4, "v5p:8x8x8"),
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = dict(call="research.data.tokenizer.load", path="hf://openai-community/gpt2/tokenizer.json")
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(call="research.models.gpt.Decoder", max_positions=LENGTH, dtype="bfloat16"),
    )
    config.data = data("train")
    config.evals = dict(
        validation=dict(
            call="research.evaluators.means.Means", perplexity=True, data=data("validation[:2%]", ("target_bytes",))
        )
    )
    config.optimizer = dict(schedule="cosine", end_factor=0.1, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=10_000)
    config.decoding = dict(max_new_tokens=200, temperature=0.8, top_p=0.95)
    return choose(variant, VARIANTS, config)


def data(split: str, more: tuple[str, ...] = ()) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="c4/en", split=split),
        ops=[dict(call="research.data.language.CausalTokens", target_bytes=bool(more))],
        features=("input_ids", "targets", "target_mask", "attention_mask", "positions", *more),
        pack=LENGTH,
    )


def sized(config: ConfigDict, size: str) -> ConfigDict:
    layers, width, heads, rows, learning_rate, topology = SIZES[size]
    config.plan = dict(topology=topology, vocab_size=50257)
    config.batch_size = rows
    config.num_steps = round(300e9 / (rows * LENGTH))
    config.optimizer.warmup = round(375e6 / (rows * LENGTH))
    config.optimizer.learning_rate = learning_rate
    config.task.model.update(num_layers=layers, hidden_size=width, num_heads=heads, intermediate_size=4 * width)
    if width >= 2048:
        config.mesh = dict(data=1, fsdp=-1, model=1)
        config.task.model.remat = "full"
    if size == "125M":
        config.optimizer.microbatches = 4  # for the 16 GB of its slice's chips
    if size == "350M":
        config.mesh = dict(data=1, fsdp=-1, model=1)  # likewise
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = sized(config, "125M")
    config.optimizer.microbatches = 1
    config.task.model.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=32)
    config.task.model.dtype = "float32"
    return tiny_documents(config, length=32)


VARIANTS: dict[str, Callable[[ConfigDict], ConfigDict]] = {size: functools.partial(sized, size=size) for size in SIZES}
VARIANTS |= {"": VARIANTS["125M"], "tiny": tiny}
