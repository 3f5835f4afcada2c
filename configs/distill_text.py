r"""Distils a published language model into a small new one of the same vocabulary, on your own text.

  python -m research.main --config=configs/distill_text.py --workdir=runs/student --config.data.source.train=novel.txt

Each of these is said once and holds everywhere:
  --config.data.source.train       a file, a folder, a pattern or a data set of the hub: see configs/pretrain_text.py
  --config.data.source.validation  files to evaluate on instead of one document in ten
  --config.data.source.unit        what a document is in plain text: "paragraph" (the default), "file" or "line"
  --config.init.teacher            the teacher: hf://ORG/NAME, or a folder; its tokenizer is the student's
  --config.data.pack               tokens a row
  --config.task.divergence         forward, KL(teacher || student) (Hinton 2015), or reverse, KL(student || teacher)
                                   (Gu 2024), over the tokens of the text
  --config.task.temperature        both models' logits are divided by it
  --config.task.teacher_share      of the divergence in the loss; the rest is the cross-entropy of the text
  --config.task.model.num_layers, hidden_size, num_heads, intermediate_size   the size of the student

What is reported is the held-out "divergence" and "cross_entropy", in nats a token. The student is of Llama's kind, 8
layers of 384, 33 million parameters, 19 million of them the table of SmolLM2's 49,152 words.
Recipe: AdamW at 1e-3, a cosine to 10 %, 2,000 steps of 16 rows of 512 tokens. Expected: depends on the text. Hardware:
an accelerator; 2 operations a parameter and token for the teacher beside 6 for the student: 7.7e12 a step.
`:tiny` needs neither network nor files and takes seconds; its teacher is made of zeros, so that it finds all bytes
equally likely.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import choose, derived, tiny_documents

FEATURES = ("input_ids", "targets", "target_mask", "attention_mask", "positions")


def get_config(variant: str = "") -> ConfigDict:
    teacher = FieldReference("hf://HuggingFaceTB/SmolLM2-135M")
    validation, length = FieldReference(""), FieldReference(512)
    documents = dict(
        call="research.data.files.text",
        train=placeholder(str),
        validation=validation,
        held_out=derived(validation, lambda files: 0.0 if files else 0.1, float),
        unit=FieldReference("paragraph"),
    )

    def data(split: str) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=documents | dict(split=split),
            ops=[dict(call="research.data.language.CausalTokens")],
            features=FEATURES,
            pack=length,
        )

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_steps = 2000
    config.tokenizer = dict(call="research.data.tokenizer.load", path=teacher)
    config.task = dict(
        call="research.tasks.lm_distillation.LanguageModelDistillation",
        divergence="forward",
        temperature=1.0,
        teacher_share=1.0,
        logits_chunk=128,
        model=decoder(hidden_size=384, num_layers=8, num_heads=6, intermediate_size=1024),
        teacher=dict(call="research.pretrained.huggingface.load_model", path=teacher, kind="causal_lm"),
    )
    config.init = dict(call="research.pretrained.teacher.load_params", teacher=teacher)
    config.data = data("train")
    config.evals = dict(validation=dict(call="research.evaluators.means.Means", data=data("validation")))
    config.optimizer = dict(
        learning_rate=1e-3,
        schedule="cosine",
        warmup=100,
        end_factor=0.1,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        freeze=("^teacher/",),
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=250, keep=2)
    config.log = dict(every_steps=25, evaluate_every_steps=250)
    config.decoding = dict(max_new_tokens=256, temperature=0.8, top_p=0.95)
    return choose(variant, VARIANTS, config)


def decoder(**sizes: int) -> dict:
    return dict(
        call="research.models.gpt.Decoder",
        positions="rotary",
        norm="rms",
        activation="silu",
        gated=True,
        attention_bias=False,
        out_bias=False,
        mlp_bias=False,
        **sizes,
    )


def tiny(config: ConfigDict) -> ConfigDict:
    sizes = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    config.task.model, config.task.teacher = ConfigDict(decoder(**sizes)), ConfigDict(decoder(**sizes))
    config.task.teacher_share = 0.5
    config = tiny_documents(config, length=32)
    config.init = dict(call="research.configuration.initial.normal", deviations=(("^teacher/", 0.0),))
    config.decoding.max_new_tokens = 8
    return config


VARIANTS = {"": lambda config: config, "tiny": tiny}
