"""Predictions for images: from a folder, one file or JSON lines, by a run on a folder of images of its own."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from research import main, predict
from research.configuration import overrides
from research.data.shapes import NAMES, shapes
from research.errors import UserError
from research.evaluate import restore_params
from research.experiment import Experiment
from research.reporting.record import load_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SMALL = ["hidden_size=32", "num_layers=2", "num_heads=2", "intermediate_size=64", "unroll=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn shapes, a folder a class; a copy of one lies deeper, of another format and not square."""
    root = tmp_path_factory.mktemp("photos")
    for number, example in enumerate(shapes(count=60, size=48)):
        path = root / NAMES[example["label"]] / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = example["image"] * (np.arange(3) == example["label"])  # red, green or blue: learned in a few steps
        PIL.Image.fromarray(image.astype(np.uint8)).save(path, quality=95)
    (root / "disc" / "more").mkdir()
    PIL.Image.open(root / "disc" / "00.jpg").resize((64, 50)).save(root / "disc" / "more" / "x.PNG")
    return root


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """A run of the `scratch` variant on that folder, as the command line makes it, made small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp().parent / "compiled"))
        workdir = tmp_path_factory.mktemp("run")
        flags = [f"--config.task.model.encoder.{change}" for change in SMALL]
        flags += ["--config.data.ops[0].size=32", "--config.task.model.encoder.image_size=32"]
        flags += ["--config.num_epochs=20", "--config.batch_size=8", "--config.data.source.held_out=0.2"]
        flags += [
            "--config.optimizer.learning_rate=3e-3",
            "--config.data.ops[0].area=0.7,1",
            "--config.data.ops[2].magnitude=1",
        ]
        flags += [f"--config.data.source.path={folder}"]
        assert main.main([f"--config={CONFIGS}/finetune_images.py:scratch", f"--workdir={workdir}", *flags]) == 0
        yield workdir


def run(workdir, source, tmp_path, capsys, status=0):
    """Predicts as the command line does; returns the lines, or what was said on the standard error."""
    output = tmp_path / "out.jsonl"
    code = main.main(["--mode=predict", f"--workdir={workdir}", f"--input={source}", f"--output={output}"])
    assert code == status
    if status:
        assert not output.exists()
        return capsys.readouterr().err
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_the_run_follows_its_folder(workdir):
    experiment = Experiment(load_config(workdir))
    assert experiment.label_names == tuple(sorted(NAMES))
    assert experiment.task.model.num_outputs == 3
    result = json.loads((workdir / "result.json").read_text())
    assert result["metrics"]["test/accuracy"] > 0.5


def test_a_folder(workdir, folder, tmp_path, capsys):
    rows = run(workdir, folder, tmp_path, capsys)
    assert [row["image"] for row in rows] == [str(path) for path in sorted(folder.rglob("*.*"))]
    assert all(tuple(row) == ("image", "label", "probabilities") for row in rows)
    right = [row["label"] == pathlib.Path(row["image"]).relative_to(folder).parts[0] for row in rows]
    assert np.mean(right) > 0.5
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)


def test_predictions_are_those_of_evaluation_and_not_of_augmented_images(workdir, folder, tmp_path, capsys):
    rows = run(workdir, folder, tmp_path, capsys)
    experiment = Experiment(load_config(workdir))
    _, params = restore_params(experiment, workdir, "")
    evaluator = experiment.evaluators["test"].data
    for row in rows[::10]:
        (example,) = evaluator.transform({"image": row["image"]})
        batch = {"image": example["image"][None], "mask": np.ones(1)}
        expected = experiment.task.predict(params, batch, jax.random.key(0))["probabilities"][0]
        np.testing.assert_allclose(list(row["probabilities"].values()), expected, atol=1e-5)


def test_one_image_and_json_lines(workdir, folder, tmp_path, capsys, monkeypatch):
    every = {row["image"]: row for row in run(workdir, folder, tmp_path, capsys)}
    path = str(folder / "disc" / "more" / "x.PNG")
    (alone,) = run(workdir, path, tmp_path, capsys)
    assert alone["image"] == path
    assert alone["probabilities"] == pytest.approx(every[path]["probabilities"], abs=1e-5)
    shutil.copy(path, tmp_path / "no_suffix")
    (again,) = run(workdir, tmp_path / "no_suffix", tmp_path, capsys)
    assert again["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
    monkeypatch.chdir(folder)
    (tmp_path / "in.jsonl").write_text('{"image": "cross/02.jpg", "label": "?", "id": 7}\n{"image": "disc/00.jpg"}\n')
    first, second = run(workdir, tmp_path / "in.jsonl", tmp_path, capsys)
    assert (first["image"], first["id"]) == ("cross/02.jpg", 7)
    assert first["probabilities"] == pytest.approx(every[str(folder / "cross" / "02.jpg")]["probabilities"], abs=1e-5)
    assert second["label"] == every[str(folder / "disc" / "00.jpg")]["label"]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({"a.jpg": b"<html>"}, "a.jpg", r"--input: '.*a.jpg' cannot be decoded: it is no image of a known format"),
        ({"a.heic": b"\0\0\0\x18ftyp"}, "a.heic", r"--input: '.*a.heic' cannot be decoded: it is no image"),
        ({"a/b.png": b"\x89PNG\r\n\x1a\n"}, "a", r"--input: '.*a/b.png' cannot be decoded: "),
        ({"a/b.txt": b""}, "a", r"--input: .*a holds no image, a file that ends in .jpg"),
        ({"a.jsonl": b'{"image": "nowhere.jpg"}'}, "a.jsonl", "--input: line 1: there is no image file 'nowhere.jpg'"),
        ({"a.jsonl": b'{"imag": "x.jpg"}'}, "a.jsonl", "--input: line 1: an example has no image 'image'; did you"),
        ({"a.jsonl": b'{"image": 3}'}, "a.jsonl", "--input: line 1: an image is int, neither a path nor"),
        ({}, "nowhere", "--input: there is no file"),
    ],
)
def test_what_is_no_image(workdir, tmp_path, capsys, files, source, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    error = run(workdir, tmp_path / source, tmp_path, capsys, status=2)
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_a_run_of_texts_takes_no_folder(tmp_path):
    config = overrides.load(f"{CONFIGS}/movie_snippets.py:tiny")
    with pytest.raises(UserError, match=r"--input: .* is a folder; this run takes a file of JSON lines"):
        predict.run(config, tmp_path, str(tmp_path))


def test_ops_that_draw_make_way_for_an_evaluators():
    config = overrides.load(f"{CONFIGS}/finetune_images.py:tiny")
    calls = [op["call"].rpartition(".")[2] for op in predict.without_augmentation(config).data.ops]
    assert calls == ["Decode", "Resize", "CenterCrop", "Normalize"]
    config.evals = {}
    assert predict.without_augmentation(config).data.ops == json.loads(config.to_json())["data"]["ops"]
    assert predict._image_field(predict.without_augmentation(config)) == "image"
    text = overrides.load(f"{CONFIGS}/movie_snippets.py:tiny")
    assert predict.without_augmentation(text).data.ops == json.loads(text.to_json())["data"]["ops"]
    assert predict._image_field(text) is None
