"""Pretrains T5 by span corruption on C4 (Raffel 2019, section 3.1.4): configs/t5.py:SIZE.

  T5              width  layers  heads x width   MLP    parameters  operations
  small             512   6 + 6        8 x 64   2048        60.5 M      7.6e18
  base              768  12 + 12      12 x 64   3072       222.9 M      2.8e19
  large            1024  24 + 24      16 x 64   4096       737.7 M      9.3e19
  3b               1024  24 + 24     32 x 128  16384       2.852 B      3.6e20
  11b              1024  24 + 24    128 x 128  65536       11.31 B      1.4e21
  version 1.1, whose MLP has a gate, and whose output layer is no more the word table
  v1_1_small        512   8 + 8        6 x 64   1024        77.0 M      9.7e18
  v1_1_base         768  12 + 12      12 x 64   2048       247.6 M      3.1e19
  v1_1_large       1024  24 + 24      16 x 64   2816       783.2 M      9.9e19
  v1_1_xl          2048  24 + 24      32 x 64   5120       2.850 B      3.6e20
  v1_1_xxl         4096  24 + 24      64 x 64  10240       11.14 B      1.4e21

The sizes are those of the published config.json files (from memory), so that --mode=export writes what Transformers
loads as T5. Recipe: 2^19 steps of 128 rows of 512 tokens, of which 15 % in spans of 3 become targets of 114; Adafactor
(Shazeer 2018) at 0.01 relative to the size of each parameter, without weight decay, and the inverse square root of the
step (section 3.1.2), which is constant for the first 10,000 steps there and rises linearly here; dropout 0.1, none for
version 1.1.

Published, of base after this pretraining and fine-tuning on each task (table 1, the baseline; from memory): GLUE 83.28,
CNN/Daily Mail 19.24 ROUGE-2, SQuAD 80.88 exact match, English to German 26.98 BLEU. Table 14 has small and base at GLUE
77.4 and 82.7, English to German 26.7 and 30.9 (checked against transcriptions only), after 1 trillion tokens.

Not run here: 34 billion tokens of C4's English, which TFDS prepares with Apache Beam, once. `operations` are 6 a
parameter and token, half the parameters on 512 tokens a row, half on 114. On 8 TPU v3 chips at 35 % of their peak of
123e12 a second: 6 hours for small, 23 hours for base, 3 days for large, 12 for 3b and 48 for 11b. From large on
parameters are split over all devices and activations are computed again in the backward pass.
`:tiny` needs neither network nor files and takes seconds.
"""

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents

# Width, layers of each side, heads, width of a head, width of the MLP.
SIZES = {
    "small": (512, 6, 8, 64, 2048),
    "base": (768, 12, 12, 64, 3072),
    "large": (1024, 24, 16, 64, 4096),
    "3b": (1024, 24, 32, 128, 16384),
    "11b": (1024, 24, 128, 128, 65536),
    "v1_1_small": (512, 8, 6, 64, 1024),
    "v1_1_base": (768, 12, 12, 64, 2048),
    "v1_1_large": (1024, 24, 16, 64, 2816),
    "v1_1_xl": (2048, 24, 32, 64, 5120),
    "v1_1_xxl": (4096, 24, 64, 64, 10240),
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.num_steps = 2**19
    config.tokenizer = dict(call="research.data.tokenizer.load", path="hf://google-t5/t5-small/tokenizer.json")
    config.task = dict(
        call="research.tasks.seq2seq.Seq2Seq",
        model=dict(
            call="research.models.encoder_decoder.EncoderDecoder",
            vocab_size=32128,  # the tokenizer's 32,100, rounded up as in the published models
            positions="relative",
            norm="rms",
            norm_first=True,
            norm_epsilon=1e-6,
            use_bias=False,
            embedding_scale=1.0,
            dtype="bfloat16",
        ),
    )
    config.data = data("train")
    config.evals = dict(
        validation=dict(call="research.evaluators.means.Means", perplexity=True, data=data("validation[:2%]"))
    )
    config.optimizer = dict(
        direction=dict(call="research.directions.adafactor"),
        learning_rate=1e-2,
        schedule="inverse_sqrt",
        warmup=10_000,
        clip_norm=None,  # Adafactor clips each update
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(topology="v3:4x4")
    config.checkpoint = dict(every_steps=5000, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=20_000)
    config.decoding = dict(max_new_tokens=114)
    return choose(variant, VARIANTS, config)


def data(split: str) -> dict:
    decoder = ("decoder_input_ids", "decoder_attention_mask", "targets", "target_mask")
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="c4/en", split=split),
        ops=[dict(call="research.data.language.SpanCorruption", max_length=512)],
        features=("input_ids", "attention_mask", "positions", *decoder, "decoder_positions"),
        pack=512,
        pack_decoder=114,
    )


def sized(config: ConfigDict, size: str) -> ConfigDict:
    width, layers, heads, head_width, inner = SIZES[size]
    gated = size.startswith("v1_1")
    config.task.model.update(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        head_width=head_width,
        intermediate_size=inner,
        activation="gelu_new" if gated else "relu",
        gated=gated,
        tie_embeddings=not gated,
        logits_scale=1.0 if gated else width**-0.5,
        dropout=0.0 if gated else 0.1,
    )
    if layers >= 24:
        config.mesh = dict(data=1, fsdp=-1, model=1)
        config.task.model.remat = "full"
        config.plan.topology = "v5p:4x4x4" if size in ("11b", "v1_1_xxl") else "v3:8x8"
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = sized(config, "base")
    model = dict(hidden_size=32, num_layers=2, num_heads=2, head_width=16, intermediate_size=64, vocab_size=288)
    config.task.model.update(model, logits_scale=32**-0.5, dtype="float32")
    config = tiny_documents(config, length=32)
    config.tokenizer.sentinels = 28
    return config


VARIANTS: dict[str, Callable[[ConfigDict], ConfigDict]] = {size: functools.partial(sized, size=size) for size in SIZES}
VARIANTS |= {"": VARIANTS["base"], "tiny": tiny}
