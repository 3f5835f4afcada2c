"""Pretrains a small GPT on Jane Austen's six novels, byte by byte.

Data: 244 chapters to train, 14 to validate and 11 to test (every twentieth of a novel), packed into rows of 256 bytes
in which no chapter sees another. Model: GPT-2's (Radford 2019), 4 layers, 256 wide, 3.3 million parameters.
Expected: see experiments/jane_austen_gpt; of the test chapters behind the others, bzip2 -9 needs 2.28 and xz -9e 2.14
bits a byte.
Hardware: 2 CPU cores, a quarter of an hour.
`:bpe` trains a vocabulary of 2,048 byte pairs first, and a model on it. `:muon` takes Muon (Jordan 2024) for the
kernels of the blocks, with updates as large as AdamW's. `:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import choose, tiny_documents


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_steps = 1500
    config.tokenizer = dict(call="research.data.tokenizer.byte_level")
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(
            call="research.models.gpt.Decoder",
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            intermediate_size=1024,
            max_positions=256,
            unroll=4,
        ),
    )
    config.data = data("train")
    config.evals = {
        split: dict(call="research.evaluators.means.Means", perplexity=True, data=data(split, ("target_bytes",)))
        for split in ("validation", "test")
    }
    config.optimizer = dict(
        learning_rate=1e-3, schedule="cosine", warmup=100, end_factor=0.1, b2=0.95, weight_decay=0.1, clip_norm=1.0
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=250, keep=2)
    config.log = dict(every_steps=25, evaluate_every_steps=250)
    config.decoding = dict(max_new_tokens=400, temperature=0.8, top_p=0.95)
    return choose(variant, VARIANTS, config)


def data(split: str, more: tuple[str, ...] = ()) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="jane_austen", split=split),
        ops=[dict(call="research.data.language.CausalTokens", target_bytes=bool(more))],
        features=("input_ids", "targets", "target_mask", "attention_mask", "positions", *more),
        pack=256,
    )


def bpe(config: ConfigDict) -> ConfigDict:
    config.tokenizer = dict(
        call="research.data.tokenizer_training.train",
        source=dict(call="research.data.source.tfds", dataset="jane_austen", split="train"),
        kind="bpe",
        vocab_size=2048,
    )
    return config


def muon(config: ConfigDict) -> ConfigDict:
    del config.optimizer.b2
    config.optimizer.direction = dict(call="research.directions.muon", b2=0.95)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model.update(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=32)
    return tiny_documents(config, length=32)


VARIANTS = {"": lambda config: config, "bpe": bpe, "muon": muon, "tiny": tiny}
