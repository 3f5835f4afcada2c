"""--mode=choose on small encoders made by the test: one that sees the words, and one to which all texts are alike."""

import json
import pathlib

import jax
import numpy as np
import pytest

from research import choose, main
from research.data import tokenizer
from research.models import bert
from research.pretrained import huggingface

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "finetune_text.py"
TABLE = "good film,good|bad film,bad|fine plot,good|dull plot,bad"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two published models, seeing and blind, and a table of 80 texts."""
    folder = tmp_path_factory.mktemp("choose")
    encoder = bert.Encoder(260, 16, 1, 2, 32, 64, initializer_range=0.2)
    model = bert.SequenceClassifier(encoder, 2)
    ids = np.zeros((1, 4), np.int32)
    params = model.init(jax.random.key(0), ids, np.ones_like(ids), ids)["params"]
    params = jax.tree.map(np.asarray, params)
    blind = jax.tree.map(np.copy, params)
    word = blind["encoder"]["embeddings"]["word"]["embedding"]
    word[:] = word[:1]
    for name, weights in (("seeing", params), ("blind", blind)):
        huggingface.save(folder / name, model, weights)
        tokenizer.byte_level().save(folder / name)
    rows = [f"{text.split(',')[0]} {i:02d},{text.split(',')[1]}" for i in range(20) for text in TABLE.split("|")]
    (folder / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return folder


def run(folder, workdir, candidates, *more):
    flags = [f"--config={CONFIG}", f"--config.data.source.train={folder}/reviews.csv"]
    flags += ["--config.data.ops[0].max_length=16", "--config.batch_size=8"]
    return main.main([*flags, "--mode=choose", f"--workdir={workdir}", f"--candidates={candidates}", *more])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_model_that_sees_the_words_is_first(folder, tmp_path, cache, capsys, monkeypatch):
    assert run(folder, tmp_path / "ranking", f"{folder}/blind,{folder}/seeing") == 0
    result = json.loads((tmp_path / "ranking" / "choose.json").read_text())
    first, second = result["candidates"]
    assert (first["name"], second["name"]) == (f"{folder}/seeing", f"{folder}/blind")
    for name in ("logme", "h_score", "linear_probe", "nearest"):
        assert first["scores"][name]["value"] > second["scores"][name]["value"]
        assert first["scores"][name]["interval"][0] <= first["scores"][name]["value"]
    assert first["scores"]["linear_probe"]["value"] > 0.9
    assert first["scores"]["logme"]["first_in"] == 1
    assert first["cost"]["parameters"] == second["cost"]["parameters"] > 0
    assert first["cost"]["operations"] > 0
    assert first["cost"]["peak_bytes"] > 0
    assert any("2 candidates" in caution for caution in result["cautions"])
    assert (tmp_path / "ranking" / "choose.png").read_bytes().startswith(b"\x89PNG")
    assert "best first by LogME" in capsys.readouterr().out

    def fail(*_):
        raise AssertionError("features were extracted again")

    monkeypatch.setattr(choose, "_extract", fail)
    assert run(folder, tmp_path / "again", f"{folder}/seeing,{folder}/blind") == 0
    assert json.loads((tmp_path / "again" / "choose.json").read_text())["candidates"] == result["candidates"]


@pytest.mark.parametrize(
    ("candidates", "more", "said"),
    [
        ("{0}/seeing", (), "two or more"),
        ("{0}/seeing,{0}/absent", (), "{0}/absent: "),
        ("{0}/seeing,{0}/blind", ("--examples=10",), "--examples: 10"),
        ("{0}/seeing,configs/nothing.py", (), "configs/nothing.py: "),
        ("{0}/seeing," + str(CONFIG.parent / "movie_snippets.py:tiny"), (), "examples are too few"),
    ],
)
def test_what_is_wrong_is_named(folder, tmp_path, cache, capsys, candidates, more, said):
    assert run(folder, tmp_path, candidates.format(folder), *more) == 2
    assert said.format(folder) in capsys.readouterr().err


def test_a_task_without_a_ranking_is_refused(folder, tmp_path, cache, capsys):
    config = CONFIG.parent / "squad.py"
    flags = [f"--config={config}:tiny", "--mode=choose", f"--workdir={tmp_path}"]
    assert main.main([*flags, f"--candidates={config}:tiny,{folder}/seeing"]) == 2
    assert "cannot be ranked" in capsys.readouterr().err
