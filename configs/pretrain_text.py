r"""Pretrains a small language model on your own text, with a tokenizer that is trained on it first.

  python -m research.main --config=configs/pretrain_text.py --workdir=runs/mine --config.data.source.train=novel.txt

Each of these is said once and holds everywhere:
  --config.data.source.train       a file, a folder, or a pattern such as "notes/**/*.md": plain text, or CSV, TSV, JSON
                                   lines or Parquet, all but Parquet perhaps as .gz or .zst; or a data set of the hub,
                                   hf://datasets/ORG/NAME[@REVISION][#config=NAME,split=NAME]. One document in ten is
                                   held out and evaluated on
  --config.data.source.validation  files to evaluate on instead; a data set of the hub is its split of that name
  --config.data.source.held_out    another share than 0.1 (none with validation files)
  --config.data.source.unit        what a document is in plain text: "file", "paragraph" or "line"; by default a
                                   paragraph of a single .txt or .md file, else a file. No document sees another, so
                                   that novels are better given as a folder of chapters
  --config.data.source.field       the column of text in tables
  --config.data.pack               tokens a row
  --config.tokenizer.kind          bpe, wordpiece or unigram
  --config.tokenizer.vocab_size    how many tokens it has, at most
  --config.task.model.num_layers, hidden_size, num_heads, intermediate_size   the size of the model

The default is a GPT (Radford 2019) of 4 layers of 256, 5.3 million parameters, on 8,192 byte pairs; bits per byte is
the number that other tokenizers' models can be compared by. Go on with a text by --mode=generate --prompt="...".
`:mlm` is a BERT (Devlin 2018) as small, on 8,192 word pieces in lower case, to be fine-tuned: give its workdir to
research.configuration.transfer.load_params, as configs/small_bert_snippets.py does.
Recipe: AdamW at 1e-3, a cosine to 10 %, 2,000 steps of 16 rows of 256 tokens, or 8 million tokens. Expected: depends on
the text. Hardware: any; at 6 operations a parameter and token 2,000 steps are 2.6e14 floating-point operations: three
quarters of an hour on 2 CPU cores that do 1e11 a second, seconds on an accelerator.
`:tiny` and `:mlm-tiny` need neither network nor files and take seconds.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import choose, derived, tiny_documents

CAUSAL = ("input_ids", "targets", "target_mask", "attention_mask", "positions")


def get_config(variant: str = "") -> ConfigDict:
    train, validation, length = placeholder(str), FieldReference(""), FieldReference(256)
    documents = dict(
        call="research.data.files.text",
        train=train,
        validation=validation,
        held_out=derived(validation, lambda files: 0.0 if files else 0.1, float),
        unit=derived(train, unit, str),
        field=FieldReference("text"),
    )

    def data(split: str, more: tuple[str, ...] = ()) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=documents | dict(split=split),
            ops=[dict(call="research.data.language.CausalTokens", target_bytes=bool(more))],
            features=(*CAUSAL, *more),
            pack=length,
        )

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_steps = 2000
    config.tokenizer = dict(
        call="research.data.tokenizer_training.train",
        source=documents | dict(split="train"),
        kind="bpe",
        vocab_size=8192,
        lowercase=False,
    )
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        model=dict(
            call="research.models.gpt.Decoder",
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            intermediate_size=1024,
            max_positions=length,
            unroll=4,
        ),
    )
    config.data = data("train")
    config.evals = dict(
        validation=dict(
            call="research.evaluators.means.Means", perplexity=True, data=data("validation", ("target_bytes",))
        )
    )
    config.optimizer = dict(
        learning_rate=1e-3, schedule="cosine", warmup=100, end_factor=0.1, b2=0.95, weight_decay=0.1, clip_norm=1.0
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=250, keep=2)
    config.log = dict(every_steps=25, evaluate_every_steps=250)
    half = derived(length, lambda length: length // 2, int)  # the rest of the positions is for the prompt
    config.decoding = dict(max_new_tokens=half, temperature=0.8, top_p=0.95)
    return choose(variant, VARIANTS, config)


def unit(train: str | None) -> str:
    """Return what a document is: a paragraph of a single file, else a file."""
    single = train and train.endswith((".txt", ".md")) and "*" not in train
    return "paragraph" if single else "file"


def mlm(config: ConfigDict) -> ConfigDict:
    length = config.data.get_ref("pack")
    config.tokenizer.update(kind="wordpiece", lowercase=True)
    config.task = dict(
        call="research.tasks.masked_lm.MaskedLM",
        max_predictions=derived(length, lambda length: round(0.16 * length), int),
        model=dict(
            call="research.models.bert.MaskedLM",
            encoder=dict(
                call="research.models.bert.Encoder",
                hidden_size=256,
                num_layers=4,
                num_heads=4,
                intermediate_size=1024,
                max_positions=length,
                unroll=4,
            ),
        ),
    )
    for node in (config.data, config.evals.validation.data):
        node.ops = [
            dict(call="research.data.language.Pieces", max_length=length),
            dict(call="research.data.language.MaskTokens", share=0.15, whole_word=False),
        ]
        node.features = CAUSAL
    del config.decoding
    config.optimizer.update(schedule="linear", end_factor=0.0, b2=0.999, weight_decay=0.01)
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    tokenizer = config.tokenizer
    config.task.model.update(TINY)
    config.data.pack = 32
    config = tiny_documents(config, length=32)
    config.tokenizer = tokenizer
    config.tokenizer.source = config.data.source
    config.tokenizer.vocab_size = 260
    return config


def mlm_tiny(config: ConfigDict) -> ConfigDict:
    config = mlm(config)
    config.task.model.encoder.update(TINY, initializer_range=0.2, unroll=1)
    config.task.max_predictions = 8
    config.data.pack = 32
    return tiny_documents(config, length=32)


TINY = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
VARIANTS = {"": lambda config: config, "mlm": mlm, "tiny": tiny, "mlm-tiny": mlm_tiny}
