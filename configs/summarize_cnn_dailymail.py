"""Fine-tunes T5 to summarise news: the highlights of CNN's and the Daily Mail's articles (See 2017, not anonymised).

The default is t5-small; --config.init.path=hf://google-t5/t5-base and so on are its larger sizes. Recipe: that of
Raffel 2019 where it can be had: the prefix "summarize: ", articles cut at 512 tokens, batch 128, a constant learning
rate of 1e-3, dropout 0.1, beam search of 4 with length penalty 0.6 (section 3.1 and 3.7); AdamW at 3e-4 takes the place
of Adafactor, 3 epochs that of the mixture of all tasks with 2^18 more steps on this one. The published t5-small has
seen these articles in that mixture.

Published, ROUGE-1 / ROUGE-2 / ROUGE-L of the test set (table 14; from memory):
  small   41.12 / 19.56 / 38.35
  base    42.05 / 20.34 / 39.40
  large   42.50 / 20.68 / 39.75
Its ROUGE-L goes sentence by sentence, `rougeLsum` here; its words are stemmed, these are not, and these are fractions.
Not run here: the data and the weights need the network. Hardware: one accelerator. 287,113 pairs, 3 epochs: at 6
operations a parameter and token, half the parameters on 512 tokens, half on up to 128, 1e17 floating-point operations
for small: a quarter of an hour of an A100 at 35 % of its peak of 312e12 a second, and then 11,490 summaries to write.
`:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict, FieldReference

from research.configuration.variants import choose, tiny_documents

ENCODER = ("input_ids", "attention_mask")
DECODER = ("decoder_input_ids", "decoder_attention_mask", "targets", "target_mask")


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference("hf://google-t5/t5-small")
    max_length, decoder_max_length, prefix = FieldReference(512), FieldReference(128), FieldReference("summarize: ")

    def data(split: str, features: tuple[str, ...]) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=dict(call="research.data.source.tfds", dataset="cnn_dailymail", split=split),
            ops=[
                dict(
                    call="research.data.language.Seq2Seq",
                    source="article",
                    target="highlights",
                    prefix=prefix,
                    max_length=max_length,
                    decoder_max_length=decoder_max_length,
                )
            ],
            features=features,
        )

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.num_epochs = 3.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.seq2seq.Seq2Seq",
        model=dict(call="research.pretrained.huggingface.load_model", path=path, kind="encoder_decoder"),
    )
    config.init = dict(path=path)
    config.data = data("train", (*ENCODER, *DECODER))
    config.evals = dict(
        validation=dict(
            call="research.evaluators.means.Means", perplexity=True, data=data("validation", (*ENCODER, *DECODER))
        ),
        test=dict(
            call="research.evaluators.generation.Generation",
            scores=("rouge1", "rouge2", "rougeL", "rougeLsum"),
            reference="highlights",
            data=data("test", ENCODER),
        ),
    )
    config.optimizer = dict(learning_rate=3e-4, schedule="constant", warmup=500, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=50, evaluate_every_steps=0)
    config.decoding = dict(num_beams=4, length_penalty=0.6, max_new_tokens=decoder_max_length, prefix=prefix)
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
    config = tiny_documents(config, length=32, fields=("article", "highlights"))
    config.decoding.update(num_beams=2, max_new_tokens=8)
    return config


VARIANTS = {"": lambda config: config, "tiny": tiny}
