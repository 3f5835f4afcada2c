"""Question answering and token classification as the command line runs them: train, then predict for other lines."""

import json
import pathlib

import jax
import pytest

from research import main

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp().parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def trained(config, folder):
    assert main.main([f"--config={CONFIGS}/{config}", f"--workdir={folder}"]) == 0
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    return {name.split("/")[1]: value for name, value in metrics.items()}


def predict(folder, rows, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
    assert main.main(["--mode=predict", f"--workdir={folder}", *flags]) == 0
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", ["tiny", "v2-tiny"])
def test_questions(variant, tmp_path):
    metrics = trained(f"squad.py:{variant}", tmp_path / "run")
    assert metrics["f1"] > 0.6, metrics
    rows = [
        {"question": "who?", "context": "there was a <cat>."},
        {"question": "who?", "context": "well, " * 20 + "there was a <dog>." + " well" * 20},
        {"question": "who?", "context": ""},
        {"question": "who?", "context": "it is said, and I believe it, that there was a <emu>."},
    ]
    rows[0]["answers"] = {"text": ["cat"], "answer_start": [13]}  # some lines may have them, and it does not matter
    found = predict(tmp_path / "run", rows, tmp_path)
    assert [row["context"] for row in found] == [row["context"] for row in rows]
    assert [found[i]["answer"] for i in (0, 2, 3)] == ["cat", "", "emu"]
    for row in found:
        assert sum(entry["score"] for entry in row["n_best"]) == pytest.approx(1)
        for entry in row["n_best"]:
            assert row["context"][entry["start"] : entry["end"]] == entry["answer"]
    alone = predict(tmp_path / "run", rows[1:2], tmp_path)
    assert alone[0]["score"] == pytest.approx(found[1]["score"], abs=1e-5)


def test_entities(tmp_path):
    metrics = trained("conll2003.py:tiny", tmp_path / "run")
    assert metrics["f1"] > 0.8, metrics
    rows = [{"tokens": ["Bob", "Lee", "sat", "in", "Oslo", "."]}, {"tokens": []}]
    found = predict(tmp_path / "run", rows, tmp_path)
    assert found[0]["entities"] == [
        {"label": "PER", "text": "Bob Lee", "start": 0, "end": 2},
        {"label": "LOC", "text": "Oslo", "start": 4, "end": 5},
    ]
    assert found[1]["entities"] == found[1]["labels"] == []
