"""The tokenizer of a run: made once, kept in its folder, and taken from there ever after."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from research import evaluate, export, predict, train
from research.data import tokenizer, tokenizer_training
from research.errors import UserError
from research.experiment import Experiment
from research.reporting.record import Record, load_config, write_json

RECORDS = [{"text": f"{word} film {i}", "label": k} for i in range(6) for k, word in enumerate(("bad", "good"))]
SOURCE = {"call": "research.data.source.examples", "records": RECORDS, "label_names": {"label": ("bad", "good")}}


def get_config(vocab_size=300, records=RECORDS):
    encoder = {"call": "research.models.bert.Encoder", "vocab_size": 300, "hidden_size": 16, "num_layers": 1}
    encoder |= {"num_heads": 2, "intermediate_size": 32, "max_positions": 16}
    data = {
        "call": "research.data.dataset.Dataset",
        "source": SOURCE,
        "ops": [{"call": "research.data.text.Tokenize", "max_length": 16}],
        "features": ["input_ids", "attention_mask", "label"],
        "length_buckets": 1,
    }
    config = {
        "batch_size": 4,
        "num_steps": 2,
        "tokenizer": {
            "call": "research.data.tokenizer_training.train",
            "source": SOURCE | {"records": records},
            "kind": "wordpiece",
            "vocab_size": vocab_size,
        },
        "task": {
            "call": "research.tasks.classification.Classification",
            "model": {"call": "research.models.bert.SequenceClassifier", "encoder": encoder},
        },
        "data": data,
        "evals": {"test": {"call": "research.evaluators.classification.Scores", "data": data}},
        "optimizer": {"learning_rate": 1e-3},
        "log": {"every_steps": 1},
    }
    return ConfigDict(json.loads(json.dumps(config)))


@pytest.fixture
def only_kept(monkeypatch):
    """From now on nothing can be trained."""

    def forbid():
        def fail(*_, **__):
            raise AssertionError("it trained the tokenizer again")

        monkeypatch.setattr(tokenizer_training, "train", fail)

    return forbid


def encode(tokens):
    return [tokens.backend.encode(record["text"]).ids for record in RECORDS]


def test_a_run_keeps_its_tokenizer(tmp_path, only_kept, capsys):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    workdir = tmp_path / "run"
    result = train.run(get_config(), workdir)
    assert capsys.readouterr().err.count("training a wordpiece tokenizer on 12 examples ...") == 1
    ids = encode(tokenizer.load(str(workdir / "tokenizer")))
    assert ids == encode(Experiment(get_config()).tokenizer)
    assert not list(workdir.glob(".tokenizer*"))

    only_kept()
    config = load_config(workdir)
    assert evaluate.run(config, workdir)["metrics"] == result["metrics"]
    (tmp_path / "in.jsonl").write_text('{"text": "good film"}\n')
    predict.run(config, workdir, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    assert json.loads((tmp_path / "out.jsonl").read_text())["label"] in ("bad", "good")
    exported = tokenizer.load(str(export.run(config, workdir)))
    assert encode(exported) == ids
    assert (exported.pad_id, exported.mask_id) == (0, 4)

    (workdir / "result.json").unlink()  # as if it had been killed at its end
    again = train.run(get_config(), workdir)
    np.testing.assert_equal(again["metrics"], result["metrics"])


def test_another_tokenizer_is_another_run(tmp_path):
    experiment = Experiment(get_config(), workdir=tmp_path)
    with Record(tmp_path, experiment.resolved):
        pass
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config.tokenizer.vocab_size: .* a run with 300, this one has 200"):
        train.run(get_config(vocab_size=200), tmp_path)


def test_only_the_tokenizer_of_the_same_config_is_taken(tmp_path, only_kept):
    Experiment(get_config(), workdir=tmp_path / "new").keep_tokenizer()
    first = Experiment(get_config(), workdir=tmp_path)
    first.keep_tokenizer()
    # Stopped before the config was recorded, by a run with another tokenizer: no one may take it for theirs.
    other = get_config(records=[{"text": "zebra zebra zebra"}])
    write_json(tmp_path / "config.json", get_config(vocab_size=120).to_dict())
    second = Experiment(other, workdir=tmp_path)
    assert "zebra" in second.tokenizer.backend.get_vocab()
    second.keep_tokenizer()
    write_json(tmp_path / "config.json", other.to_dict())
    only_kept()
    assert "zebra" in Experiment(other, workdir=tmp_path).tokenizer.backend.get_vocab()
    with pytest.raises(AssertionError, match="trained the tokenizer again"):
        _ = Experiment(get_config(), workdir=tmp_path).tokenizer


def test_no_tokenizer_and_no_folder(tmp_path):
    config = get_config()
    Experiment(config).keep_tokenizer()
    config.tokenizer = None
    Experiment(config, workdir=tmp_path).keep_tokenizer()
    assert list(tmp_path.iterdir()) == []
