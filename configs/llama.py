"""Pretrains models of Llama's kind on English web text, from scratch: configs/llama.py:SIZE.

  size           layers  width  heads (groups)  vocabulary  parameters  tokens    operations
  smollm2_135m       30    576           9 (3)      49,152     134.5 M    2.7 B      2.2e18
  smollm2_360m       32    960          15 (5)      49,152     361.8 M    7.2 B      1.6e19
  smollm2_1.7b       24   2048         32 (32)      49,152     1.711 B     34 B      3.5e20
  llama2_7b          32   4096         32 (32)      32,000     6.738 B    135 B      5.4e21
  llama2_13b         40   5120         40 (40)      32,000     13.02 B    260 B      2.0e22
  llama2_70b         80   8192          64 (8)      32,000     68.98 B    1.4 T      5.7e23
  llama3_8b          32   4096          32 (8)     128,256     8.030 B    161 B      7.7e21
  llama3_70b         80   8192          64 (8)     128,256     70.55 B    1.4 T      6.0e23

The sizes are those of the published config.json files (Touvron 2023b; Grattafiori 2024; Allal 2025; from memory, as is
the recipe), with their rotary bases, so that --mode=export writes what Transformers loads as Llama. Recipe: Llama 2's
(Touvron 2023b, section 2.2): AdamW, betas 0.9 and 0.95, epsilon 1e-5, weight decay 0.1, gradients clipped at 1, a
cosine to 10 %, 2,000 steps of warm-up (SmolLM2: a tenth of the run), 4 million tokens a step (SmolLM2: 0.5 million).
Length: 20 tokens a parameter, what the compute is best spent on (Hoffmann 2022). The published models saw far more (2,
15 and 2 to 11 trillion tokens) of texts that are not published, so that no published loss is to be compared.

Not run here. `operations` are 6 a parameter and token. At 35 % of an H100's peak of 989e12 a second 8 of them take 13
minutes for 135M, 35 hours for 1.7B, 22 days for 7B and 32 days for Llama 3 8B, 1,024 of them 20 days for 70B. From 1.7B
on parameters are split over all devices and activations are computed again in the backward pass. C4's English, which
TFDS prepares with Apache Beam, once, has about 0.15 trillion tokens, and is repeated where that is not enough.
Llama's tokenizers are for those who accepted their licence on the hub; --config.tokenizer.path takes any other one.
`:tiny` needs neither network nor files and takes seconds.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents

TOKENS_PER_PARAMETER = 20


class Size(NamedTuple):
    """What distinguishes a size."""

    parameters: float
    width: int
    layers: int
    heads: int
    groups: int
    inner: int  # width of the MLP
    theta: float  # base of the rotary wavelengths
    length: int
    rows: int  # of a batch
    learning_rate: float
    warmup: float
    tokenizer: str
    vocab_size: int
    topology: str


SMOLLM2 = "hf://HuggingFaceTB/SmolLM2-135M/tokenizer.json"
LLAMA2 = "hf://meta-llama/Llama-2-7b-hf/tokenizer.json"
LLAMA3 = "hf://meta-llama/Meta-Llama-3-8B/tokenizer.json"
SIZES = {
    "smollm2_135m": Size(134.5e6, 576, 30, 9, 3, 1536, 1e5, 2048, 256, 3e-3, 0.1, SMOLLM2, 49152, "v6e:4x4"),
    "smollm2_360m": Size(361.8e6, 960, 32, 15, 5, 2560, 1e5, 2048, 256, 3e-3, 0.1, SMOLLM2, 49152, "v6e:4x4"),
    "smollm2_1.7b": Size(1.711e9, 2048, 24, 32, 32, 8192, 1.3e5, 2048, 256, 5e-4, 0.1, SMOLLM2, 49152, "v5p:4x4x4"),
    "llama2_7b": Size(6.738e9, 4096, 32, 32, 32, 11008, 1e4, 4096, 1024, 3e-4, 2000, LLAMA2, 32000, "v5p:4x4x8"),
    "llama2_13b": Size(13.02e9, 5120, 40, 40, 40, 13824, 1e4, 4096, 1024, 3e-4, 2000, LLAMA2, 32000, "v5p:4x4x8"),
    "llama2_70b": Size(68.98e9, 8192, 80, 64, 8, 28672, 1e4, 4096, 1024, 1.5e-4, 2000, LLAMA2, 32000, "v5p:8x8x8"),
    "llama3_8b": Size(8.030e9, 4096, 32, 32, 8, 14336, 5e5, 8192, 512, 3e-4, 2000, LLAMA3, 128256, "v5p:4x4x8"),
    "llama3_70b": Size(70.55e9, 8192, 80, 64, 8, 28672, 5e5, 8192, 512, 1.5e-4, 2000, LLAMA3, 128256, "v5p:8x8x8"),
}

PUBLISHED = {"llama2_7b": 184_320, "llama2_70b": 1_720_320}  # hours of chips


def get_config(variant: str = "") -> ConfigDict:
    return choose(variant, VARIANTS, ConfigDict())


def recipe(config: ConfigDict, size: str) -> ConfigDict:
    s = SIZES[size]

    def data(split: str, more: tuple[str, ...] = ()) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=dict(call="research.data.source.tfds", dataset="c4/en", split=split),
            ops=[dict(call="research.data.language.CausalTokens", target_bytes=bool(more))],
            features=("input_ids", "targets", "target_mask", "attention_mask", "positions", *more),
            pack=s.length,
        )

    large = s.parameters > 1e9
    config.plan = dict(topology=s.topology, vocab_size=s.vocab_size)
    if size in PUBLISHED:
        config.plan.published = dict(chip="a100", chip_hours=PUBLISHED[size], tokens=2e12, source="Touvron 2023, 2.2.1")
    config.seed = 0
    config.batch_size = s.rows
    config.num_steps = round(TOKENS_PER_PARAMETER * s.parameters / (s.rows * s.length))
    config.tokenizer = dict(call="research.data.tokenizer.load", path=s.tokenizer)
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(
            call="research.models.gpt.Decoder",
            hidden_size=s.width,
            num_layers=s.layers,
            num_heads=s.heads,
            num_kv_heads=s.groups,
            intermediate_size=s.inner,
            max_positions=s.length,
            positions="rotary",
            rope_theta=s.theta,
            norm="rms",
            activation="silu",
            gated=True,
            attention_bias=False,
            out_bias=False,
            mlp_bias=False,
            tie_embeddings=s.tokenizer == SMOLLM2,
            dtype="bfloat16",
            remat="full" if large else "none",
        ),
    )
    config.data = data("train")
    config.evals = dict(
        validation=dict(
            call="research.evaluators.means.Means", perplexity=True, data=data("validation[:2%]", ("target_bytes",))
        )
    )
    config.optimizer = dict(
        learning_rate=s.learning_rate,
        schedule="cosine",
        warmup=s.warmup,
        end_factor=0.1,
        b2=0.95,
        epsilon=1e-5,
        weight_decay=0.1,
        clip_norm=1.0,
        microbatches=1 if large else 4,
    )
    config.mesh = dict(data=1, fsdp=-1, model=1) if large else dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=1000, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=5000)
    config.decoding = dict(max_new_tokens=200, temperature=0.8, top_p=0.95)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = recipe(config, "smollm2_135m")
    model = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, max_positions=32)
    config.task.model.update(model, dtype="float32")
    config.optimizer.microbatches = 1
    return tiny_documents(config, length=32)


VARIANTS: dict[str, Callable[[ConfigDict], ConfigDict]] = {size: functools.partial(recipe, size=size) for size in SIZES}
VARIANTS |= {"": VARIANTS["smollm2_135m"], "tiny": tiny}
