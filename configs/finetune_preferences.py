r"""Fine-tunes a published chat model on your own preferences: DPO, IPO, KTO, ORPO or SimPO.

  python -m research.main --config=configs/finetune_preferences.py --workdir=runs/preferences \
      --config.data.source.train=preferences.jsonl

A line of the file: {"prompt": "Hello", "chosen": "Hi!", "rejected": "What?"}. Each of the three may be a list of
messages instead, {"role": "user", "content": "Hello"}; so may both answers be whole conversations, with
--config.data.source.prompt="" where there is no prompt beside them. Each of these is said once and holds everywhere:
  --config.data.source.train     the file: JSON lines, perhaps as .gz or .zst, or Parquet (or a folder, or a pattern, of
                                 them); or a data set of the hub, hf://datasets/ORG/NAME, and where a split is not
                                 called "train", hf://datasets/ORG/NAME#split=train_prefs. One preference in ten is held
                                 out and evaluated on
  --config.data.source.test      a file to evaluate on instead; a data set of the hub is its split "test"
  --config.data.source.held_out  another share than 0.1 (none with a test file)
  --config.data.source.prompt, .chosen, .rejected    the fields
  --config.task.objective        dpo, ipo, kto, orpo or simpo; give simpo a --config.task.beta of 2 or more
  --config.task.reference_dtype  bfloat16 holds what dpo, ipo and kto compare with in half of the memory
  --config.task.precompute_reference  true: dpo and ipo compute what they compare with once, before training or by
                                 --mode=prepare, hold no second model, and take a forward pass less a step
  --config.init.path             the model: hf://ORG/NAME, a folder, or what --mode=export wrote; best one that was
                                 tuned on conversations, by configs/finetune_chat.py
  --config.data.ops[0].max_length  tokens a conversation; longer ones are cut

Conversations are rendered with the model's chat template, else as ChatML; the loss is on the answers. What is reported
is the held-out share of pairs whose chosen answer has the greater reward ("accuracy"), the rewards and by how much they
differ ("margin"), and the share whose chosen answer is the likelier one ("likelier"), which also says something before
training. Try the result with --mode=generate --prompt="...".
Recipe: AdamW at 5e-6, linearly down to 0 after a tenth of warm-up, 1 epoch, 16 pairs a step, beta 0.1; billions of
parameters want 5e-7. Expected: depends on the preferences.
Hardware: an accelerator. 8 operations a parameter and token, 2 of them for the reference: 3.5e13 a step of 16 pairs of
1,024 tokens for the 135 million of SmolLM2, which is 0.3 s of an A100 at 35 % of its peak of 312e12 a second.
`:smollm2` is the same model, quantised to 4 bits, from the package registry where the hub cannot be reached, on 4 pairs
of 256 tokens. `:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import SMOLLM2, choose, datasets, derived, tiny_decoder, tiny_run

COLOURS = ("red", "blue", "green")
FEATURES = ("input_ids", "targets", "target_mask", "attention_mask")
COMPARED = ("dpo", "ipo", "kto")  # with a reference


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference("hf://HuggingFaceTB/SmolLM2-135M-Instruct")
    test, objective, length = FieldReference(""), FieldReference("dpo"), FieldReference(1024)
    ahead = FieldReference(False)
    preferences = dict(
        call="research.data.files.preferences",
        train=placeholder(str),
        test=test,
        held_out=derived(test, lambda file: 0.0 if file else 0.1, float),
        **{name: FieldReference(name) for name in ("prompt", "chosen", "rejected")},
    )

    def data(split: str | FieldReference) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=preferences | dict(split=split),
            ops=[dict(call="research.data.preferences.PreferenceTokens", max_length=length)],
            features=tuple(side + name for side in ("", "rejected_") for name in FEATURES),
        )

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16
    config.num_epochs = 1.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.preferences.Preferences",
        objective=objective,
        beta=0.1,
        reference_dtype="float32",
        precompute_reference=ahead,
        logits_chunk=256,
        model=dict(call="research.pretrained.huggingface.load_model", path=path, kind="causal_lm"),
    )
    config.init = dict(path=path)
    config.data = data("train")
    held_out = derived(test, lambda file: "test" if file else "validation", str)
    config.evals = dict(test=dict(call="research.evaluators.means.Means", data=data(held_out)))
    config.optimizer = dict(
        learning_rate=5e-6,
        schedule="linear",
        warmup=0.1,
        weight_decay=0.0,
        clip_norm=1.0,
        freeze=derived(objective, frozen, tuple, ahead),
    )
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=10, evaluate_every_steps=0)
    config.decoding = dict(max_new_tokens=256, chat=True, stop=("<|im_end|>",))  # the end of a turn in ChatML
    return choose(variant, VARIANTS, config)


def frozen(objective: str, ahead: bool) -> tuple[str, ...]:
    return ("^reference/",) if objective in COMPARED and not ahead else ()


def smollm2(config: ConfigDict) -> ConfigDict:
    config.init.path = SMOLLM2
    config.batch_size = 4
    for node in datasets(config):
        node.ops[0]["max_length"] = 256
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = tiny_decoder(config, num_layers=2, max_positions=128)
    records = []
    for thing in ("sky", "sea", "sun", "car"):
        for i, colour in enumerate(COLOURS):
            other = COLOURS[(i + 1) % len(COLOURS)]
            records.append({"prompt": f"{colour} {thing}?", "chosen": f"It is {colour}.", "rejected": f"No, {other}."})
    for node in datasets(config):
        node.ops[0]["max_length"] = 128
        node.source = dict(call="research.data.source.examples", records=records)
        node.length_buckets, node.window = 1, 3
    return tiny_run(config)


VARIANTS = {"": lambda config: config, "smollm2": smollm2, "tiny": tiny}
