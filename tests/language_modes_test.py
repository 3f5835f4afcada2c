"""Language tasks as the command line runs them: train, then predict for other lines."""

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


def test_masked_language_models_fill_in_and_are_started_from(tmp_path, capsys, caplog):
    run = tmp_path / "run"
    trained("bert_pretraining.py:tiny", run)
    found = predict(run, [{"text": "the [MASK]at sat"}, {"text": "the dog"}], tmp_path)
    (choices,) = found[0]["masks"]
    assert len(choices) == 5
    assert sum(choices.values()) < 1
    flags = ["--config.init.call=research.configuration.transfer.load_params", f"--config.init.path={run}"]
    config = f"--config={CONFIGS}/small_bert_snippets.py:tiny"
    assert main.main([config, f"--workdir={tmp_path}/tuned", "--config.init={}", *flags]) == 0
    # The pretrained encoder learns on; only the head is new.
    assert "newly initialised, as the weights hold none: head_dense/bias" in caplog.text
    assert main.main([config, f"--workdir={tmp_path}/other", "--config.init={}", *flags, "--config.init.new=[]"]) == 2
    assert "has no parameter head_output/" in capsys.readouterr().err


def test_causal_language_models_say_how_likely_a_text_is(tmp_path):
    trained("jane_austen_gpt.py:tiny", tmp_path / "run")
    likely, unlikely = predict(tmp_path / "run", [{"text": "the cat sat"}, {"text": "qqqqzzzzxxx"}], tmp_path)
    assert likely["tokens"] == unlikely["tokens"] == 12  # with the end
    assert likely["perplexity"] < unlikely["perplexity"] / 2


def test_an_answer_ends_where_its_turn_does(tmp_path, capsys):
    """Without a template turns are ChatML's, whose end the tokenizer need not know as the end of a text."""
    flags = ["--config.num_steps=150", "--config.log.evaluate_every_steps=0", "--config.decoding.max_new_tokens=60"]
    assert main.main([f"--config={CONFIGS}/finetune_chat.py:tiny", f"--workdir={tmp_path}/run", *flags]) == 0
    capsys.readouterr()
    assert main.main(["--mode=generate", f"--workdir={tmp_path}/run", "--prompt=sky: red?"]) == 0
    answer = capsys.readouterr().out
    assert answer.startswith("sky is ")
    assert answer.endswith(".\n")
    assert "<|im" not in answer


@pytest.mark.parametrize("config", ["libreoffice_translation.py:tiny", "chat_translation.py:tiny"])
def test_texts_that_are_written(config, tmp_path):
    trained(config, tmp_path / "run")
    rows = [{"source": "the cat sat"}, {"source": "the dog"}]
    found = predict(tmp_path / "run", rows, tmp_path)
    assert [row["source"] for row in found] == [row["source"] for row in rows]
    assert all(isinstance(row["prediction"], str) for row in found)
