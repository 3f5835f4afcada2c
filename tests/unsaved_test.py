"""Checkpoints leave out what config.init gives and nothing changes, and what they leave out comes back as it was."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from research import checkpoint, evaluate, export, train
from research.configuration import overrides
from research.data import tokenizer
from research.errors import UserError
from research.experiment import Experiment
from research.models import bert, gpt
from research.pretrained import huggingface
from research.reporting import figures
from research.runtime.preemption import PreemptedError
from research.tasks.adapters import flat

STEPS, LAST = 6, 4
SIZES = {"vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
SIZES |= {"max_positions": 64}


@pytest.fixture(autouse=True, scope="module")
def _no_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "curves", lambda *_, **__: None)  # they take longer to draw than all else
        yield


def publish(folder: pathlib.Path, seed: int) -> str:
    """Writes a classifier whose parameters hold negative zeros, and returns where."""
    encoder = bert.Encoder(**SIZES)
    model = bert.SequenceClassifier(encoder, num_outputs=2)
    params = jax.jit(model.init)(jax.random.key(seed), *[np.zeros((1, 4), np.int32)] * 2)["params"]
    signed = jax.tree.map(lambda x: np.where(np.arange(x.shape[-1]) == 0, np.float32(-0.0), x), params)
    return str(huggingface.save(folder, model, signed, tokenizer_files=tokenizer.byte_level().save(folder.parent)))


def configured(path: str, variant: str = "lora-tiny"):
    config = overrides.load(f"configs/movie_snippets.py:{variant}")
    model = {"call": "research.pretrained.huggingface.sequence_classifier", "path": path}
    (config.task.task if "task" in config.task else config.task).model = model
    config.update(init={"path": path, "new_head": True}, num_epochs=None, num_steps=STEPS)
    config.checkpoint.update(every_steps=2, keep=3)
    config.log.evaluate_every_steps = LAST
    return config


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    return publish(tmp_path_factory.mktemp("published") / "model", 0)


@pytest.fixture(scope="module")
def run(published, tmp_path_factory) -> pathlib.Path:
    """The folder of a run with adapters that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.run(configured(published), folder)
    return folder


@pytest.fixture
def copied(run, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run, tmp_path / "copied"))


def state(config, folder: pathlib.Path, step: int = STEPS):
    experiment = Experiment(config, workdir=folder)
    checkpoints = experiment.checkpoints(folder, read_only=True)
    try:
        return checkpoints.read(step, experiment.abstract_state)[0]
    finally:
        checkpoints.close()


def bits(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_holds_what_trains(run, published, tmp_path, monkeypatch):
    config = configured(published)
    config.num_steps = 2
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_unsaved", ())
        train.run(config, tmp_path / "whole")
    left_out, whole = (size(folder / "checkpoints" / "2" / "state") for folder in (run, tmp_path / "whole"))
    base = sum(x.nbytes for x in jax.tree.leaves(state(configured(published), run).params["base"]))
    assert whole - left_out > 0.8 * base  # they are compressed


def test_the_base_is_the_published_one_bit_by_bit(run, published):
    experiment = Experiment(configured(published), workdir=run)
    assert bits(state(configured(published), run).params["base"]) == bits(experiment.pretrained()["base"])


def test_a_stopped_run_ends_with_the_same_bits(run, published, tmp_path):
    config = configured(published)
    with pytest.raises(PreemptedError):
        train.run(config, tmp_path / "stopped", stop_at=3)
    train.run(config, tmp_path / "stopped")
    assert bits(state(config, tmp_path / "stopped")) == bits(state(config, run))
    results = (json.loads((folder / "result.json").read_text())["metrics"] for folder in (run, tmp_path / "stopped"))
    assert next(results) == next(results)


@pytest.mark.parametrize("variant", ["qlora-tiny", "dora-tiny", "ia3-tiny", "prompt-tiny", "bias-tiny"])
def test_whatever_is_frozen_comes_back(variant, published, tmp_path):
    config = configured(published, variant)
    config.num_steps = 4
    with pytest.raises(PreemptedError):
        train.run(config, tmp_path / "run", stop_at=2)
    stopped = state(config, tmp_path / "run", 2)
    result = train.run(config, tmp_path / "run")
    resumed = state(config, tmp_path / "run", 4)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), stopped.params, resumed.params)
    described = json.loads((tmp_path / "run" / "checkpoints" / "4" / "extras" / "metadata").read_text())
    for path, changed in flat(moved).items():
        assert changed != (path in described["elsewhere"]), path
    assert evaluate.run(config, tmp_path / "run")["metrics"] == pytest.approx(result["metrics"])
    train.run(config, tmp_path / "whole")
    assert bits(state(config, tmp_path / "whole", 4)) == bits(resumed)


def test_checkpoints_that_hold_everything_are_resumed(run, published, tmp_path, monkeypatch):
    config = configured(published)
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_unsaved", ())
        with pytest.raises(PreemptedError):
            train.run(config, tmp_path / "older", stop_at=LAST - 1)
    for path in (tmp_path / "older" / "checkpoints").glob("*/extras/metadata"):
        content = json.loads(path.read_text())
        del content["elsewhere"], content["digest"]  # as older ones are
        path.write_text(json.dumps(content | {"digest": checkpoint._digest(content)}))
    older = size(tmp_path / "older" / "checkpoints" / str(LAST - 1))
    train.run(config, tmp_path / "older")
    assert size(tmp_path / "older" / "checkpoints" / str(STEPS)) < older
    assert bits(state(config, tmp_path / "older")) == bits(state(config, run))


def test_other_extras_of_a_checkpoint_that_holds_everything(published, tmp_path, monkeypatch):
    config = configured(published)
    config.update(num_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_unsaved", ())
        train.run(config, tmp_path / "older")
    (tmp_path / "older" / "result.json").unlink()
    before = bits(state(config, tmp_path / "older", 2))
    train.run(config, tmp_path / "older")  # evaluates again, and replaces what is not an array
    assert bits(state(config, tmp_path / "older", 2)) == before


def test_another_base_is_one_line(copied, published, tmp_path):
    other = publish(tmp_path / "other" / "model", 1)
    config = configured(published)
    config.init.path = other
    with pytest.raises(UserError, match=r"^config\.init: base/\S+ is not what it was when the run began") as raised:
        evaluate.run(config, copied)
    assert "\n" not in str(raised.value)
    config.init = None
    with pytest.raises(UserError, match=r"^config\.init: it is missing, and gave base/"):
        evaluate.run(config, copied)


def test_a_changed_base_stops_a_resumed_run(copied, published):
    shutil.rmtree(copied / "checkpoints" / str(STEPS))
    (copied / "result.json").unlink()
    weights = pathlib.Path(published) / "model.safetensors"
    before = weights.read_bytes()
    tensors = safetensors.numpy.load(before)
    tensors["bert.encoder.layer.1.output.dense.bias"][3] += 1e-6
    try:
        safetensors.numpy.save_file(tensors, weights)
        with pytest.raises(UserError, match="is not what it was when the run began"):
            train.run(configured(published), copied)
    finally:
        weights.write_bytes(before)
    assert {path.name for path in (copied / "checkpoints").iterdir()} == {"2", str(LAST)}
    train.run(configured(published), copied)


def test_evaluations_and_exports_read_the_base_again(run, published, tmp_path):
    config = configured(published)
    result = json.loads((run / "result.json").read_text())
    assert evaluate.run(config, run)["metrics"] == pytest.approx(result["metrics"])
    folder = export.run(config, run, str(tmp_path / "exported"))
    model = huggingface.sequence_classifier(str(folder))
    step, params = evaluate.restore_params(Experiment(config, workdir=run), run, "latest")
    assert step == STEPS
    loaded, _ = huggingface.load_params(str(folder), model, jax.eval_shape(lambda: params))
    assert bits(loaded) == bits(params)


def test_a_reference_is_left_out_and_comes_back(tmp_path):
    decoder = gpt.Decoder(260, 16, 1, 2, intermediate_size=32, max_positions=128)
    params = jax.jit(decoder.init)(jax.random.key(7), np.zeros((1, 4), np.int32))["params"]
    files = tokenizer.byte_level().save(tmp_path / "tokenizer")
    path = str(huggingface.save(tmp_path / "model", decoder, params, tokenizer_files=files))
    config = overrides.load("configs/finetune_preferences.py:tiny")
    config.task.model = {"call": "research.pretrained.huggingface.load_model", "path": path, "kind": "causal_lm"}
    config.task.reference_dtype = "bfloat16"
    config.update(init={"path": path}, num_steps=2)
    config.log.evaluate_every_steps = 0
    with pytest.raises(PreemptedError):
        train.run(config, tmp_path / "stopped", stop_at=1)
    train.run(config, tmp_path / "stopped")
    train.run(config, tmp_path / "run")
    assert bits(state(config, tmp_path / "run", 2)) == bits(state(config, tmp_path / "stopped", 2))
    described = json.loads((tmp_path / "run" / "checkpoints" / "2" / "extras" / "metadata").read_text())
    assert described["elsewhere"]
    assert all(name.startswith("reference/") for name in described["elsewhere"])
