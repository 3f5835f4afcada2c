"""Evaluate, predict and export: what a trained run's folder is good for, without its training data."""

import importlib.util
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from research import evaluate, export, main, predict, train
from research.configuration.variants import tiny_text_model
from research.data import tokenizer
from research.errors import UserError
from research.evaluate import restore_params
from research.experiment import Experiment
from research.pretrained import huggingface
from research.reporting.record import load_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TEXTS = ["a good film", "bad! \u2028 naïve 映画 🎬", "x", "odd book", "good!", "bad as ever", "" * 3, "odd"] * 3


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    cache = str(tmp_path_factory.getbasetemp().parent / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


def finetune_text(table, kind="classification"):
    spec = importlib.util.spec_from_file_location("finetune_text", CONFIGS / "finetune_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.source.train, config.data.source.kind = str(table), kind
    config.data.source.text, config.data.source.label = ("review",), "stars"
    return config


def write_table(path, labels):
    rows = [{"review": f"{['bad', 'good', 'odd'][i % 3]} film {i}", "stars": labels[i % 3]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LABELS = {
    "classification": ["1 star", "2 stars", "zéro"],
    "multi_label": [["short"], ["long", "sharp"], []],
    "regression": [0.5, 3.5, 2],
}


@pytest.fixture(scope="module", params=LABELS)
def run(request, tmp_path_factory):
    """The folder of a run; its table is gone."""
    workdir = tmp_path_factory.mktemp(request.param)
    table = write_table(workdir / "table.jsonl", LABELS[request.param])
    config = tiny_text_model(finetune_text(table, request.param))
    config.num_epochs = 0.5
    config.optimizer.warmup = 2
    train.run(config, workdir)
    return request.param, workdir


def forget(workdir, monkeypatch):
    """Makes every look at the training data fail."""

    def fail(*_, **__):
        raise AssertionError("it read the training data")

    (workdir / "table.jsonl").rename(workdir / "gone.jsonl")
    monkeypatch.setattr("research.data.source.table", fail)


@pytest.fixture
def without_data(run, monkeypatch):
    kind, workdir = run
    forget(workdir, monkeypatch)
    yield kind, workdir
    (workdir / "gone.jsonl").rename(workdir / "table.jsonl")


def test_evaluate_repeats_the_result(run):
    _, workdir = run
    result = json.loads((workdir / "result.json").read_text())
    assert evaluate.run(load_config(workdir), workdir) == {"step": result["step"], "metrics": result["metrics"]}
    stored = json.loads((workdir / "evaluation.json").read_text())
    np.testing.assert_equal(stored, {"step": result["step"], "metrics": result["metrics"]})


def predictions(workdir, rows, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    predict.run(load_config(workdir), workdir, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]


def test_predict(without_data, tmp_path):
    kind, workdir = without_data
    rows = [{"id": i, "text": text} | ({"label": "gold"} if i % 2 else {}) for i, text in enumerate(TEXTS)]
    found = predictions(workdir, rows, tmp_path)
    assert [(row["id"], row["text"]) for row in found] == list(enumerate(TEXTS))
    if kind == "regression":
        assert all(type(row["value"]) is float for row in found)
        return
    names = ("1 star", "2 stars", "zéro") if kind == "classification" else ("long", "sharp", "short")
    for row in found:
        assert tuple(row["probabilities"]) == names
        if kind == "classification":
            assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-6)
            assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        else:
            assert row["label"] == [name for name, p in row["probabilities"].items() if p > 0.5]


def test_a_prediction_depends_on_its_own_line_only(run, tmp_path):
    _, workdir = run
    rows = [{"text": text} for text in TEXTS[:8]]
    together = predictions(workdir, rows, tmp_path)
    alone = predictions(workdir, rows[3:4], tmp_path)
    for key in ("value", "probabilities"):
        if key in alone[0]:
            assert together[3][key] == pytest.approx(alone[0][key], abs=1e-5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that tells two classes apart, as the command line makes it."""
    folder = tmp_path_factory.mktemp("movies")
    assert main.main([f"--config={CONFIGS}/movie_snippets.py:tiny", f"--workdir={folder}"]) == 0
    return folder


def test_predict_from_standard_input(workdir, capsys, monkeypatch):
    stdin = b'\xef\xbb\xbf{"text": "good film"}\n\n  \r\n{"text": "caf\xc3\xa9 bad"}\r\n{"text": "good"}'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert main.main(["--mode=predict", f"--workdir={workdir}"]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["text"] for row in rows] == ["good film", "café bad", "good"]
    assert [row["label"] for row in rows] == ["positive", "negative", "positive"]
    assert captured.err == ""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "a"}\n\n{"text": \n', "--input: line 3 is not JSON: "),
        (b'{"text": "a"}\n["text"]\n', "--input: line 2 is not a JSON object"),
        (
            b'{"text": "a"}\n{"txet": "a"}\n',
            "--input: line 2: an example has no text field 'text'; did you mean 'txet'",
        ),
        (b'{"text": "a"}\n{"text": 3}\n', "--input: line 2: an example's field 'text' must be text, not int"),
        (b'{"text": "a\xff"}\n', "--input: line 1 is not JSON: 'utf-8'"),
    ],
)
def test_lines_that_are_wrong(lines, message, workdir, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(lines)
    flags = [f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
    assert main.main(["--mode=predict", f"--workdir={workdir}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_no_lines(workdir, tmp_path):
    assert predictions(workdir, [], tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=predict", "--input=nowhere.jsonl"], "--input: there is no file nowhere.jsonl"),
        (["--mode=predict", "--input=pyproject.toml", "--output=nowhere/out"], "--output: there is no folder"),
        (["--mode=evaluate", "--checkpoint=bets"], "--checkpoint: 'bets' is not among latest, best, 10, 20"),
        (["--mode=evaluate", "--checkpoint=11"], "--checkpoint: '11' is not among"),
        (["--mode=evaluate", "--config.evals={}"], "config.evals: there is nothing to evaluate on"),
        (["--mode=evaluate", "--config.evals.tset.scores=f1"], "config.evals.tset: there is no such key"),
    ],
)
def test_mistakes(flags, message, workdir, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert main.main([f"--workdir={workdir}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_evaluate_with_other_scores(workdir, capsys):
    flags = ["--mode=evaluate", "--checkpoint=10", '--config.evals.test.scores=["matthews", "f1"]']
    assert main.main([f"--workdir={workdir}", *flags]) == 0
    assert "test/matthews" in capsys.readouterr().err
    assert json.loads((workdir / "evaluation.json").read_text())["step"] == 10


def ours(folder, config, texts):
    """Returns the logits of an exported folder, and of the run that it came from."""
    experiment = Experiment(config)
    _, params = restore_params(experiment, folder, "")
    return experiment.task.model, params, encode(experiment.tokenizer, texts)


def encode(tokens, texts):
    encoded = [tokens.backend.encode(text).ids for text in texts]
    length = max(map(len, encoded))
    ids = np.array([row + [tokens.pad_id] * (length - len(row)) for row in encoded], np.int32)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in encoded], np.int32)
    return ids, mask


def test_export_loads_back(without_data, tmp_path):
    kind, workdir = without_data
    config = load_config(workdir)
    folder = export.run(config, workdir, str(tmp_path / "export"))
    model, params, inputs = ours(workdir, config, ["a good film", "odd"])
    loaded_model = huggingface.sequence_classifier(str(folder))
    assert loaded_model.num_outputs == model.num_outputs
    shapes = jax.eval_shape(lambda: loaded_model.init(jax.random.key(0), *inputs)["params"])
    loaded, report = huggingface.load_params(str(folder), loaded_model, shapes)
    assert report.new == ()
    np.testing.assert_array_equal(
        np.asarray(model.apply({"params": params}, *inputs)),
        np.asarray(loaded_model.apply({"params": loaded}, *inputs)),
    )
    np.testing.assert_array_equal(encode(tokenizer.load(str(folder)), ["a good film", "odd"])[0], inputs[0])
    described = json.loads((folder / "config.json").read_text())
    names = {"classification": LABELS[kind], "multi_label": ["long", "sharp", "short"], "regression": ["LABEL_0"]}
    assert list(described["id2label"].values()) == names[kind]
    with pytest.raises(UserError, match="exists already"):
        export.run(config, workdir, str(folder))


def test_an_export_is_a_start_for_another_run(workdir, tmp_path, capsys):
    shutil.rmtree(workdir / "export", ignore_errors=True)
    assert main.main(["--mode=export", f"--workdir={workdir}"]) == 0
    assert (workdir / "export" / "model.safetensors").is_file()
    table = write_table(tmp_path / "more.jsonl", LABELS["classification"])
    flags = [f"--config={CONFIGS}/finetune_text.py", f"--workdir={tmp_path}/run", f"--config.data.source.train={table}"]
    flags += ["--config.data.source.text=review", "--config.data.source.label=stars", "--config.batch_size=8"]
    flags += [f"--config.init.path={workdir}/export", "--config.data.ops[0].max_length=32", "--config.num_epochs=0.3"]
    flags += ["--config.data.length_buckets=1"]
    capsys.readouterr()
    assert main.main(flags) == 2
    assert "has 2 outputs (classifier.weight), the model 3; new_head=True begins a new one" in capsys.readouterr().err
    assert main.main([*flags, "--config.init.new_head=true", f"--workdir={tmp_path}/again"]) == 0
    assert (tmp_path / "again" / "result.json").is_file()


@pytest.mark.peers
def test_transformers_predicts_the_same(run, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, workdir = run
    folder = export.run(load_config(workdir), workdir, str(tmp_path / "export"))
    texts = ["a good film", "naïve 映画", "odd"]
    found = predictions(workdir, [{"text": text} for text in texts], tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    if kind == "regression":
        np.testing.assert_allclose([row["value"] for row in found], logits[:, 0], atol=1e-5)
        return
    theirs = logits.softmax(-1) if kind == "classification" else logits.sigmoid()
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in found], theirs, atol=1e-5)
    assert list(found[0]["probabilities"]) == list(model.config.id2label.values())
