"""Trains the Transformer on English to German (Vaswani 2017, table 3, base and big), WMT14's 4.5 million pairs.

  base (the default)   6 + 6 layers of 512,   63 million parameters (65 as printed), dropout 0.1, 100,000 steps
  big                  6 + 6 layers of 1024, 214 million parameters (213 as printed), dropout 0.3, 300,000 steps
  tiny                 needs neither network nor files and takes seconds

Recipe (sections 5 and 6.1): a vocabulary of 37,000 byte pairs for both languages, which is trained first; Adam with b2
0.98 and epsilon 1e-9; the learning rate rises for 4,000 steps to (width * 4000)**-0.5 and falls with the inverse square
root of the step; label smoothing 0.1; beam search of 4 with length penalty 0.6. A batch is 96 rows of 256 + 256 tokens
into which whole pairs are packed, at most 24,576 of each language, for the paper's about 25,000. An exponential moving
average of the parameters, whose mean age is that of what the paper averages, 2,500 and 5,000 steps, takes the place of
the mean of the last 5 (base) and 20 (big) checkpoints. The length penalty is length**0.6, the paper's that of Wu 2016.

Published: BLEU 27.3 (base, from memory) and 28.4 (big) on newstest2014, of tokenized texts with their compounds
split, which is more than sacreBLEU, with which it is scored here, says of the same texts.
Not run here: the data need the network. Published cost (table 2): 3.3e18 and 2.3e19 floating-point operations, 12 hours
and 3.5 days of 8 P100; at 35 % of an A100's peak of 312e12 a second one needs 8 and 59 hours.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents

ENCODER = ("input_ids", "attention_mask")
DECODER = ("decoder_input_ids", "decoder_attention_mask", "targets", "target_mask")


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 96
    config.num_steps = 100_000
    config.tokenizer = dict(
        call="research.data.tokenizer_training.train",
        source=source("train"),
        field=("en", "de"),
        kind="bpe",
        vocab_size=37_000,
    )
    config.task = dict(
        call="research.tasks.seq2seq.Seq2Seq",
        label_smoothing=0.1,
        model=dict(
            call="research.models.encoder_decoder.EncoderDecoder",
            hidden_size=512,
            num_layers=6,
            num_heads=8,
            intermediate_size=2048,
            dropout=0.1,
            dtype="bfloat16",
        ),
    )
    config.data = packed("train")
    texts = dict(call="research.data.dataset.Dataset", source=source("test"), ops=ops(), features=ENCODER)
    config.evals = dict(
        validation=dict(call="research.evaluators.means.Means", perplexity=True, data=packed("validation")),
        test=dict(
            call="research.evaluators.generation.Generation", scores=("bleu", "chrf"), reference="de", data=texts
        ),
    )
    config.optimizer = dict(
        learning_rate=(512 * 4000) ** -0.5,
        schedule="inverse_sqrt",
        warmup=4000,
        b2=0.98,
        epsilon=1e-9,
        clip_norm=None,
        average=0.9996,
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(topology="v5e:2x4", vocab_size=37_000)
    config.checkpoint = dict(every_steps=2500, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=25_000)
    config.decoding = dict(num_beams=4, length_penalty=0.6, max_new_tokens=200)
    return choose(variant, VARIANTS, config)


def source(split: str) -> dict:
    return dict(call="research.data.source.tfds", dataset="wmt14_translate/de-en", split=split)


def ops() -> list[dict]:
    op = dict(call="research.data.language.Seq2Seq", source="en", target="de", max_length=256, decoder_max_length=256)
    return [op]


def packed(split: str) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=source(split),
        ops=ops(),
        features=(*ENCODER, "positions", *DECODER, "decoder_positions"),
        pack=256,
        pack_decoder=256,
    )


def big(config: ConfigDict) -> ConfigDict:
    config.num_steps = 300_000
    config.task.model.update(hidden_size=1024, num_heads=16, intermediate_size=4096, dropout=0.3)
    config.optimizer.update(learning_rate=(1024 * 4000) ** -0.5, average=0.9998)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.update(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, dtype="float32")
    config.optimizer.average = 0.9
    config.decoding.update(num_beams=2, max_new_tokens=8)
    return tiny_documents(config, length=32, fields=("en", "de"))


VARIANTS = {"": lambda config: config, "base": lambda config: config, "big": big, "tiny": tiny}
