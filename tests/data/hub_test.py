"""Data sets as the hub's client caches them, made here; there is no network."""

import json
import pathlib
import types

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from configs.finetune_chat import get_config
from research import assets, main, train
from research.data import files, hub
from research.errors import UserError
from research.reporting import figures

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SUFFIXES = (".parquet", ".jsonl")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "curves", lambda *_, **__: None)  # it takes longer than all else


@pytest.fixture
def lay(tmp_path, monkeypatch):
    """Returns a function that lays out a repository; the rows of a file are its own name, twice."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_RESOLVED", {})

    def lay(*names, card=None, revision="main", commit=COMMIT, rows=None):
        folder = tmp_path / "hub" / "datasets--org--name"
        (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        if card:
            (snapshot / "README.md").write_text(f"---\n{card}\n---\n# A data set\n")
        for name in names:
            table = pyarrow.Table.from_pylist(rows or [{"text": name}] * 2)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                parquet.write_table(table, snapshot / name)
            else:
                content = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
                with pyarrow.output_stream(str(snapshot / name)) as file:  # compressed as the name says
                    file.write(content.encode())
        return snapshot

    return lay


def found(uri, split="train"):
    paths = [path.as_posix() for path in hub.files(uri, split, SUFFIXES)]
    return [path.split("/", path[: path.index("/snapshots/")].count("/") + 3)[-1] for path in paths]


SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


def test_splits_by_the_names_of_shards(lay):
    lay(*SHARDS, "data/test_easy-00000-of-00001-0123456789abcdef.parquet", "data/dev-00000-of-00001.parquet", "x.py")
    assert found("hf://datasets/org/name") == SHARDS
    assert found("hf://datasets/org/name@main", "validation") == ["data/dev-00000-of-00001.parquet"]
    assert found(f"hf://datasets/org/name@{COMMIT}#split=test_easy")[0].startswith("data/test_easy")
    assert assets.resolved()["hf://datasets/org/name"] == f"commit:{COMMIT}"
    with pytest.raises(
        UserError, match=r"no split 'test'.* \(its splits by config: default: validation, test_easy, tr"
    ):
        found("hf://datasets/org/name", "test")


def test_configs_by_folders(lay):
    lay("en/train-00000-of-00001.parquet", "sv/train-00000-of-00001.parquet", "sv/test-00000-of-00001.parquet")
    assert found("hf://datasets/org/name#config=sv") == ["sv/train-00000-of-00001.parquet"]
    there = "en: train; sv: test, train"
    with pytest.raises(UserError, match=f"has several configs; add #config=NAME, of: {there}"):
        found("hf://datasets/org/name")
    with pytest.raises(UserError, match=rf"no config 'se'; did you mean 'sv'\? \(its splits by config: {there}\)"):
        found("hf://datasets/org/name#config=se")
    assert found("hf://datasets/org/name/sv", "test") == ["sv/test-00000-of-00001.parquet"]
    assert len(found("hf://datasets/org/name/*/train-*.parquet")) == 2


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("train.jsonl", ("default", "train")),
        ("anything.jsonl.gz", ("default", "train")),
        ("data/train/0.parquet", ("default", "train")),
        ("valid.jsonl", ("default", "validation")),
        ("my-dataset_test.jsonl", ("default", "test")),
        ("contest.jsonl", ("default", "train")),
        ("en/partial-train/0000.parquet", ("en", "train")),
        ("en/test_easy/0000.parquet", ("en", "test")),
        ("en/challenge/0000.parquet", ("en", "challenge")),
        ("plain_text/squad-validation-00000-of-00001.parquet", ("plain_text", "validation")),
    ],
)
def test_places(name, place):
    assert hub._place(name) == place


def test_the_converted_branch_stands_in(lay):
    lay("script.py", "data.zip")
    with pytest.raises(UserError, match=r"holds no file that ends in .parquet, .jsonl"):
        found("hf://datasets/org/name")
    lay("default/train/0000.parquet", "default/test/0000.parquet", revision="refs/convert/parquet", commit="f" * 40)
    assert found("hf://datasets/org/name") == ["default/train/0000.parquet"]
    assert found("hf://datasets/org/name@refs%2Fconvert%2Fparquet", "test") == ["default/test/0000.parquet"]


CARD = """
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: ["./a/*.parquet", "b.parquet"]
  - split: heldout
    path: c/**
- config_name: extra
  data_dir: extra
- config_name: plain
  data_files: b.parquet
"""


def test_what_the_card_says_counts(lay):
    lay("a/1.parquet", "a/2.parquet", "a/no/3.parquet", "b.parquet", "c/d/test.parquet", "extra/test.jsonl", card=CARD)
    assert found("hf://datasets/org/name") == ["a/1.parquet", "a/2.parquet", "b.parquet"]
    assert found("hf://datasets/org/name", "heldout") == ["c/d/test.parquet"]
    assert found("hf://datasets/org/name#config=extra,split=test") == ["extra/test.jsonl"]
    assert found("hf://datasets/org/name#config=plain") == ["b.parquet"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://datasets/name", "names no data set; write hf://datasets/ORG/NAME@REVISION#config=NAME,split=NAME"),
        ("hf://datasets/org/name#train", "after '#' write config=NAME or split=NAME"),
        ("hf://datasets/org/other", "not cached and .* run `hf download org/other --repo-type=dataset` and copy"),
        ("hf://datasets/org/name", "not cached and the hub cannot be reached"),
        ("hf://datasets/org/name/none", "has no such file or folder"),
    ],
)
def test_what_is_not_there(lay, uri, message):
    lay(SHARDS[0])  # of two
    with pytest.raises(UserError, match=message) as info:
        found(uri)
    assert "\n" not in str(info.value)


def test_only_the_files_of_a_split_are_fetched_and_of_the_cached_commit(lay, monkeypatch):
    remote, asked = ["README.md", *SHARDS, "data/test-00000-of-00001.parquet"], []
    snapshot = lay(card="license: mit")

    def download(repo, repo_type, revision, allow_patterns=None, local_files_only=False):
        assert (repo, repo_type) == ("org/name", "dataset")
        if not local_files_only:
            asked.append((revision, allow_patterns))
            lay_names = [name for name in allow_patterns if name in remote]
            for name in lay_names:
                (snapshot / name).parent.mkdir(exist_ok=True)
                (snapshot / name).write_text("")
        return str(snapshot)

    listing = types.SimpleNamespace(list_repo_files=lambda repo, repo_type, revision: remote)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: listing)
    assert found("hf://datasets/org/name") == SHARDS
    assert asked == [(COMMIT, SHARDS)]
    assert found("hf://datasets/org/name") == SHARDS
    assert len(asked) == 1


# --- through the public command -------------------------------------------------------------------

SMALL = ["num_steps=2", "batch_size=2", "log.every_steps=1", "data.pack=64", "data.window=2", "optimizer.warmup=1"]


def _train(config, workdir, *overrides):
    flags = [f"--config.{override}" for override in (*SMALL, *overrides)]
    assert main.main([f"--config={CONFIGS}/{config}", f"--workdir={workdir}", *flags]) == 0
    return json.loads((workdir / "result.json").read_text())["metrics"]


def test_pretraining_on_a_data_set_of_the_hub(lay, tmp_path):
    lay(
        *SHARDS,
        "data/validation-00000-of-00001.parquet",
        rows=[{"body": f"document {i} of it", "n": i} for i in range(9)],
    )
    model = ("hidden_size=32", "num_layers=1", "num_heads=2", "intermediate_size=64")
    metrics = _train(
        "pretrain_text.py",
        tmp_path / "run",
        *("data.source.train=hf://datasets/org/name", "data.source.validation=hf://datasets/org/name"),
        *("data.source.field=body", "tokenizer.vocab_size=260"),
        *(f"task.model.{setting}" for setting in model),
    )
    assert metrics["validation/perplexity"] > 1


def test_chat_on_a_data_set_of_the_hub_and_compressed_files(lay, tmp_path):
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}] for i in range(9)]
    rows = [{"messages": messages, "id": i} for i, messages in enumerate(turns)]
    snapshot = lay("train_sft.jsonl.gz", "test_sft.jsonl.zst", rows=rows)
    config, given = get_config("tiny"), get_config()
    given.data.source.train = "hf://datasets/org/name"
    given.data.source.test = str(snapshot / "test_sft.jsonl.zst")
    config.data.source, config.evals.test.data.source = given.data.source, given.evals.test.data.source
    config.num_steps = 2
    assert train.run(config, tmp_path / "run")["metrics"]["test/perplexity"] > 1
    assert [example["messages"] for example in files.chat("hf://datasets/org/name")] == turns
