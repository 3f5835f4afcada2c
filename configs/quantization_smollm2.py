"""What do fewer bits cost? SmolLM2-135M on English novels, its kernels rounded to 8 and to 4 bits.

No step is taken: the run evaluates the weights that it would start from, and the variant says how they are rounded:
`:float32` (not at all), `:int8` (a scale for each output; Dettmers 2022), and in blocks of 64 inputs `:nf4` (quantiles
of a normal distribution; Dettmers 2023), `:fp4` and `:int4`. The kernels of all blocks are rounded, embeddings and
norms are not. They are computed with in float32, so that only quality is measured: see research/pretrained/rounded.py.
Data: the 11 test chapters of Jane Austen (configs/jane_austen_gpt.py), in rows of 256 of SmolLM2's tokens.
Weights: SmolLM2-135M-Instruct (Ben Allal 2025) in its 4-bit form, from the Python package registry: they have been
rounded once, in blocks of 32 with a scale and an offset, before they are rounded here.
Published: Dettmers 2023, table 2: mean perplexity on Pile of models of 125 M to 13 B: int4 34.34, fp4 (E2M1) 31.07, nf4
27.41. Dettmers 2022, table 1: C4 perplexity of a model of 125 M in float32 25.65, in int8 by rows and columns 25.69 to
25.83. Expected: see experiments/quantization.
Hardware: 2 CPU cores, 3 minutes, 4 GB of memory. `:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict

from research.configuration.variants import SMOLLM2, choose, tiny_decoder, tiny_documents


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 8
    config.num_steps = 0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=SMOLLM2)
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(call="research.pretrained.huggingface.load_model", path=SMOLLM2, kind="causal_lm"),
    )
    config.init = dict(path=SMOLLM2)
    config.data = data("train")
    config.evals = dict(
        test=dict(call="research.evaluators.means.Means", perplexity=True, data=data("test", ("target_bytes",)))
    )
    config.optimizer = dict(learning_rate=1e-4, schedule="constant")
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=0, keep=1)
    config.log = dict(every_steps=5, evaluate_every_steps=0)
    config.decoding = dict(max_new_tokens=64)
    return choose(variant, VARIANTS, config)


def data(split: str, more: tuple[str, ...] = ()) -> dict:
    return dict(
        call="research.data.dataset.Dataset",
        source=dict(call="research.data.source.tfds", dataset="jane_austen", split=split),
        ops=[dict(call="research.data.language.CausalTokens", target_bytes=bool(more))],
        features=("input_ids", "targets", "target_mask", "attention_mask", "positions", *more),
        pack=256,
    )


def rounded(format: str):
    def change(config: ConfigDict) -> ConfigDict:
        config.init = dict(call="research.pretrained.rounded.load_params", path=SMOLLM2, format=format)
        return config

    return change


def tiny(config: ConfigDict) -> ConfigDict:
    return tiny_documents(tiny_decoder(config, num_layers=1, max_positions=64), length=32)


VARIANTS = {
    "": rounded("nf4"),
    "float32": lambda config: config,
    "int8": rounded("int8"),
    "nf4": rounded("nf4"),
    "fp4": rounded("fp4"),
    "int4": rounded("int4"),
    "tiny": tiny,
}
