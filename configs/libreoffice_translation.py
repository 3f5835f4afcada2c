"""Translates LibreOffice's help from English to German, by small transformers that are trained on it from scratch.

Data: 20,775 pairs of paragraphs of 4 to 60 words to train, 1,315 to validate, 1,019 to test, split by file; a
vocabulary of 6,000 pieces for both languages is trained first. BLEU and chrF are sacreBLEU's, with beam search of 4 and
length penalty 0.6 (Vaswani 2017, section 6.1).

  the default     the original Transformer (Vaswani 2017), reduced to 3 + 3 layers of 256, with its label smoothing of
                  0.1 and inverse-square-root schedule
  t5              T5 (Raffel 2019), as large, from scratch
  t5_pretraining  T5 on span corruption of both sides of the same training pairs, each text by itself
  t5_pretrained   T5 from what t5_pretraining left in runs/libreoffice/t5_pretraining (--config.init.path is another)
  tiny            needs neither network nor files and takes seconds

Expected: see experiments/translation and experiments/span_corruption. Hardware: 2 CPU cores; an hour for the default,
20 minutes for each of the others.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents

FEATURES = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "targets", "target_mask")
POSITIONS = ("positions", "decoder_positions")
T5 = dict(
    positions="relative",
    norm="rms",
    norm_first=True,
    norm_epsilon=1e-6,
    use_bias=False,
    embedding_scale=1.0,
    logits_scale=256**-0.5,
)


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16  # rows, of about five pairs each
    config.num_epochs = 12.0
    config.tokenizer = dict(
        call="research.data.tokenizer_training.train",
        source=source("train"),
        field=("source", "target"),
        kind="unigram",
        vocab_size=6000,
        sentinels=20,
    )
    config.task = dict(
        call="research.tasks.seq2seq.Seq2Seq",
        label_smoothing=0.1,
        model=dict(
            call="research.models.encoder_decoder.EncoderDecoder",
            hidden_size=256,
            num_layers=3,
            num_heads=4,
            intermediate_size=1024,
            dropout=0.1,
            unroll=3,
        ),
    )
    config.data = data("train", packed=True)
    config.evals = dict(
        validation=dict(call="research.evaluators.means.Means", perplexity=True, data=data("validation", packed=True)),
        test=dict(call="research.evaluators.generation.Generation", data=data("test"), scores=("bleu", "chrf")),
    )
    config.optimizer = dict(learning_rate=1e-3, schedule="inverse_sqrt", warmup=300, b2=0.98, clip_norm=1.0)
    config.optimizer.average = 0.998  # in place of the mean of the last checkpoints (Vaswani 2017, section 6.1)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=300, keep=2)
    config.log = dict(every_steps=25, evaluate_every_steps=0)
    config.decoding = dict(num_beams=4, length_penalty=0.6, max_new_tokens=100)
    return choose(variant, VARIANTS, config)


def source(split: str) -> dict:
    return dict(call="research.data.source.tfds", dataset="libreoffice/en-de", split=split)


def data(split: str, packed: bool = False) -> dict:
    node = dict(
        call="research.data.dataset.Dataset",
        source=source(split),
        ops=[dict(call="research.data.language.Seq2Seq", max_length=100, decoder_max_length=100)],
        features=FEATURES,
    )
    if packed:  # an unpacked batch is a third padding, even sorted by length
        return node | dict(features=(*FEATURES, *POSITIONS), pack=128, pack_decoder=128)
    return node | dict(length_buckets=3)


def t5(config: ConfigDict) -> ConfigDict:
    config.task.model.update(T5)
    config.task.label_smoothing = 0.0
    config.num_epochs = 5.0
    # T5's embeddings begin with a variance of 1. Its Adafactor's steps grow with a parameter's size, AdamW's do not.
    config.optimizer.update(learning_rate=2e-3, learning_rate_multipliers=(("word/embedding", 10.0),))
    return config


def t5_pretraining(config: ConfigDict) -> ConfigDict:
    config = t5(config)
    corrupt = [
        dict(call="research.data.language.Texts", fields=("source", "target")),
        dict(call="research.data.language.SpanCorruption", max_length=80),
    ]
    del config.evals.test
    for node in (config.data, config.evals.validation.data):
        node.ops = corrupt
        node.pack, node.pack_decoder = 96, 48
    config.num_epochs = None
    config.num_steps = 1500
    config.batch_size = 32
    return config


def t5_pretrained(config: ConfigDict) -> ConfigDict:
    config = t5(config)
    config.init = dict(
        call="research.configuration.transfer.load_params", path="runs/libreoffice/t5_pretraining", new=()
    )
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.update(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    config.decoding.update(num_beams=2, max_new_tokens=8)
    config.optimizer.update(average=None, learning_rate_multipliers=())
    return tiny_documents(config, length=32, fields=("source", "target"))


VARIANTS = {"": lambda config: config, "t5": t5, "t5_pretraining": t5_pretraining, "t5_pretrained": t5_pretrained}
VARIANTS |= {"tiny": tiny, "t5-tiny": lambda config: tiny(t5(config))}
