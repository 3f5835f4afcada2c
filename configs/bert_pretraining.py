"""Pretrains BERT by masked language modelling (Devlin 2018, section 3.1; masks drawn anew each time, as in Liu 2019).

base (the default), large   Wikipedia, 512 tokens, batches of 256, 1,000,000 steps at 1e-4: BERT's recipe but for its
              second corpus, which is no longer published, its first 900,000 steps on 128 tokens, and next-sentence
              prediction, which does not help (Liu 2019, table 2). Not run here: 130 billion tokens at 6 x 110 million
              (340 million) operations are 0.9e20 (2.7e20) floating-point operations: 3 (9) days of 8 TPU v3 chips at
              35 % of their peak of 123e12 a second. Published: GLUE with what comes of it, see configs/glue.py.
jane_austen   a small BERT, 4 layers of 256, on Jane Austen's six novels, with its own 4,096 word pieces: 2 CPU cores,
              half an hour. configs/small_bert_snippets.py fine-tunes it. Expected: see
              experiments/pretraining_pays.
tiny          needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256
    config.num_steps = 1_000_000
    config.tokenizer = dict(call="research.data.tokenizer.load", path="hf://google-bert/bert-base-uncased")
    config.task = dict(
        call="research.tasks.masked_lm.MaskedLM",
        max_predictions=80,
        model=dict(
            call="research.models.bert.MaskedLM", encoder=dict(call="research.models.bert.Encoder", dtype="bfloat16")
        ),
    )
    config.data = data("wikipedia/20230601.en", "train[:99%]", max_length=512)
    held_out = data("wikipedia/20230601.en", "train[99%:]", max_length=512)
    config.evals = dict(validation=dict(call="research.evaluators.means.Means", perplexity=True, data=held_out))
    config.optimizer = dict(learning_rate=1e-4, schedule="linear", warmup=10_000, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.plan = dict(topology="v5e:4x4", vocab_size=30522)
    config.checkpoint = dict(every_steps=5000, keep=2)
    config.log = dict(every_steps=100, evaluate_every_steps=50_000)
    return choose(variant, VARIANTS, config)


def data(dataset: str, split: str, max_length: int, share: float = 0.15) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset=dataset, split=split),
        ops=[
            dict(call="research.data.language.Pieces", max_length=max_length),
            dict(call="research.data.language.MaskTokens", share=share, whole_word=False),
        ],
        features=("input_ids", "attention_mask", "positions", "targets", "target_mask"),
        pack=max_length,
    )


def large(config: ConfigDict) -> ConfigDict:
    config.task.model.encoder.update(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
    config.task.model.encoder.remat = "attention"
    config.mesh = dict(data=1, fsdp=-1, model=1)
    return config


def jane_austen(config: ConfigDict) -> ConfigDict:
    config.batch_size = 64
    config.num_steps = 4000
    config.plan = dict(vocab_size=4096)
    config.tokenizer = dict(
        call="research.data.tokenizer_training.train",
        source=dict(call="research.data.source.tfds", dataset="jane_austen", split="train"),
        kind="wordpiece",
        vocab_size=4096,
        lowercase=True,
    )
    config.task.max_predictions = 12
    config.task.model.encoder.update(
        dtype="float32",
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        intermediate_size=1024,
        max_positions=128,
        initializer_range=0.05,  # the usual 0.02 is for wide models
        dropout=0.0,
        attention_dropout=0.0,
        sinusoidal_start=True,
        unroll=4,
    )
    # Short rows, many masks (Wettig 2022) and positions that begin in order: else a run as short as this one learns
    # how frequent words are, and nothing from their neighbours.
    config.data = data("jane_austen", "train", max_length=32, share=0.3)
    config.evals.validation.data = data("jane_austen", "validation", max_length=32, share=0.3)
    config.optimizer.update(learning_rate=1e-3, b2=0.98, warmup=300)
    config.checkpoint.every_steps = 250
    config.log = dict(every_steps=25, evaluate_every_steps=250)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    encoder = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=32)
    config.task.model.encoder.update(encoder, initializer_range=0.2, dtype="float32")
    config.task.max_predictions = 8
    return tiny_documents(config, length=32)


VARIANTS = {"": lambda config: config, "base": lambda config: config, "large": large}
VARIANTS |= {"jane_austen": jane_austen, "tiny": tiny}
