r"""Fine-tunes a published encoder-decoder on your own pairs of texts: translations, summaries, corrections, answers.

  python -m research.main --config=configs/finetune_seq2seq.py --workdir=runs/german \
      --config.data.source.train=pairs.tsv --config.data.source.source=english --config.data.source.target=german

Each of these is said once and holds everywhere:
  --config.data.source.train     the file: CSV, TSV, JSON lines or Parquet (or a folder, or a pattern, of them); one row
                                 in ten is held out and evaluated on
  --config.data.source.test      a file to evaluate on instead
  --config.data.source.held_out  another share than 0.1 (none with a test file)
  --config.data.source.source    the column that is read
  --config.data.source.target    the column that is to be written
  --config.data.source.columns   the columns' names, where a CSV or TSV file has no header: source,target
  --config.init.path             the model: hf://ORG/NAME, a folder, or what --mode=export wrote; T5, Flan-T5, Marian
  --config.data.ops[0].prefix    what T5 reads first, such as "translate English to German: "; Marian needs none
  --config.data.ops[0].max_length, --config.data.ops[0].decoder_max_length   tokens of source and target, at most
  --config.decoding.num_beams    of beam search
  --config.evals.test.scores     bleu,chrf (sacreBLEU's; the log has the signatures), or rouge1,rouge2,rougeL,rougeLsum

Recipe: AdamW at 3e-4, linearly down to 0, which suits T5; Marian, and what was fine-tuned before, want a tenth of it.
Expected: depends on the pairs. Hardware: any. At 6 operations a parameter and token, half the parameters on either
side, 1,000 pairs of 128 + 128 tokens, 3 epochs, are 1.4e14 floating-point operations for t5-small's 60 million
parameters: half an hour on 2 CPU cores that do 1e11 a second, seconds on an accelerator. The weights need the hub.
`:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import choose, derived, tiny_documents

ENCODER = ("input_ids", "attention_mask")
DECODER = ("decoder_input_ids", "decoder_attention_mask", "targets", "target_mask")


def get_config(variant: str = "") -> ConfigDict:
    path, prefix = FieldReference("hf://google-t5/t5-small"), FieldReference("")
    test, max_length, decoder_max_length = FieldReference(""), FieldReference(128), FieldReference(128)
    pairs = dict(
        call="research.data.files.pairs",
        train=placeholder(str),
        test=test,
        held_out=derived(test, lambda file: 0.0 if file else 0.1, float),
        source=FieldReference("source"),
        target=FieldReference("target"),
        columns=FieldReference(()),
        quoted=placeholder(bool),
    )

    def data(split: str | FieldReference, features: tuple[str, ...]) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=pairs | dict(split=split),
            ops=[
                dict(
                    call="research.data.language.Seq2Seq",
                    prefix=prefix,
                    max_length=max_length,
                    decoder_max_length=decoder_max_length,
                )
            ],
            features=features,
        )

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 3.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.seq2seq.Seq2Seq",
        model=dict(call="research.pretrained.huggingface.load_model", path=path, kind="encoder_decoder"),
    )
    config.init = dict(path=path)
    config.data = data("train", (*ENCODER, *DECODER))
    held_out = derived(test, lambda file: "test" if file else "validation", str)
    config.evals = dict(
        test=dict(
            call="research.evaluators.generation.Generation", scores=("bleu", "chrf"), data=data(held_out, ENCODER)
        )
    )
    config.optimizer = dict(learning_rate=3e-4, schedule="linear", warmup=0.1, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=0)
    config.decoding = dict(num_beams=4, length_penalty=1.0, max_new_tokens=decoder_max_length, prefix=prefix)
    return choose(variant, VARIANTS, config)


def tiny(config: ConfigDict) -> ConfigDict:
    config.task.model = dict(
        call="research.models.encoder_decoder.EncoderDecoder",
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        positions="relative",
        norm="rms",
        norm_first=True,
        use_bias=False,
        embedding_scale=1.0,
        logits_scale=32**-0.5,
    )
    config = tiny_documents(config, length=32, fields=("source", "target"))
    config.decoding.update(num_beams=2, max_new_tokens=8)
    return config


VARIANTS = {"": lambda config: config, "tiny": tiny}
