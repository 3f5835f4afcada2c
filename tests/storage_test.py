"""Paths in buckets, on fsspec's file system in memory."""

import json
import logging
import pathlib

import jax
import numpy as np
import pytest

from research import assets, evaluate, storage, train
from research.checkpoint import Checkpoints, UnreadableCheckpointError, quieten
from research.configuration import overrides
from research.data import files, image, image_files
from research.errors import UserError
from research.reporting.record import read_json, write_json
from research.reporting.writers import METRICS, Writer, read_metrics

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    quieten()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    pytest.importorskip("upath")
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield storage.path("memory://bucket/run")
    fsspec.filesystem("memory").store.clear()
    assert not list(tmp_path.glob("*:*")), "a folder named like a scheme"


def test_a_local_path_is_pathlibs(tmp_path):
    for text in (str(tmp_path), f"file://{tmp_path}", tmp_path):
        assert type(storage.path(text)) is type(tmp_path)
        assert storage.path(text) == tmp_path
    assert storage.path("~/x") == pathlib.Path.home() / "x"
    assert not storage.is_remote(tmp_path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "gss://bucket/run",
            r"unknown scheme 'gss://'.* did you mean 'gs'\?; there are: gs:// .*-e .\[gcs\]",
        ),
        ("xyzzy://bucket", r"unknown scheme 'xyzzy://' in 'xyzzy://bucket'; there are: gs://.*s3://.*\.\[s3\]"),
        ("hf://org/name", "unknown scheme 'hf://'"),  # which is read, by assets.resolve, and never written to
    ],
)
def test_an_unknown_scheme_lists_the_known_ones(uri, message):
    with pytest.raises(UserError, match=message):
        storage.path(uri)


def test_a_scheme_alone_names_no_bucket(bucket):
    with pytest.raises(UserError, match="'memory:///' names no bucket; write memory://BUCKET/FOLDER"):
        storage.path("memory:///")


def test_a_missing_driver_names_the_extra(monkeypatch):
    def missing(scheme):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"'gs://b/run': what opens gs:// is not installed; pip install -e .\[gcs\]"):
        storage.path("gs://b/run")


def test_json_is_written_and_replaced(bucket):
    assert read_json(bucket / "a.json") is None
    write_json(bucket / "a.json", {"a": 1})
    write_json(bucket / "a.json", {"a": 2})
    assert read_json(bucket / "a.json") == {"a": 2}
    assert storage.find(bucket) == ["a.json"]


def test_an_output_that_fails_leaves_nothing(bucket):
    def write(fail: bool) -> None:
        with storage.text_output("memory://bucket/run/out.jsonl") as file:
            file.write("{}\n")
            if fail:
                raise ValueError("it fails")

    with pytest.raises(ValueError, match="it fails"):
        write(fail=True)
    assert storage.find(bucket) == []
    write(fail=False)
    assert (bucket / "out.jsonl").read_text() == "{}\n"


def test_the_file_called_last_is_sent_last(bucket, tmp_path, monkeypatch):
    for name in ("a", "config.json", "z/b"):
        storage.write(tmp_path / "folder" / name, name.encode())
    sent, before = [], storage._put
    monkeypatch.setattr(storage, "_put", lambda file, send: (sent.append(file.name), before(file, send)))
    storage.put(tmp_path / "folder", bucket, last="config.json")
    assert sent == ["a", "b", "config.json"]
    assert storage.find(bucket) == ["a", "config.json", "z/b"]


def test_a_place_that_does_not_answer_is_waited_for_so_long_and_no_longer(bucket, monkeypatch):
    import threading

    monkeypatch.setattr(storage, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(type(bucket.fs), "pipe_file", lambda *_: threading.Event().wait(5))
    with pytest.raises(UserError, match=r"--workdir: memory://bucket/run cannot be written to .*no answer within 0 s"):
        storage.check_folder("--workdir", bucket, writes=True)


def test_a_copy_is_made_once_and_again_when_what_is_there_changes(bucket, monkeypatch):
    storage.write(bucket / "model" / "a.txt", b"one")
    storage.write(bucket / "model" / "b" / "c.txt", b"two")
    first = assets.resolve("memory://bucket/run/model")
    assert (first.name, (first / "a.txt").read_text(), (first / "b" / "c.txt").read_text()) == ("model", "one", "two")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "download", None)
        assert assets.resolve("memory://bucket/run/model") == first
    storage.write(bucket / "model" / "a.txt", b"three")
    assert (assets.resolve("memory://bucket/run/model") / "a.txt").read_text() == "three"
    assert assets.resolve("memory://bucket/run/model/a.txt").read_text() == "three"
    assert assets.resolved()["memory://bucket/run/model"].startswith("listing:")
    with pytest.raises(UserError, match="no such file or folder: 'memory://bucket/run/modle'"):
        assets.resolve("memory://bucket/run/modle")


def test_texts_are_read_from_a_bucket_by_folder_and_by_pattern(bucket):
    for name in ("a.txt", "b.txt", "c.md"):
        storage.write(bucket / "texts" / name, f"text of {name}".encode())
    found = files.text("memory://bucket/run/texts", unit="file")
    assert [found[i]["text"] for i in range(len(found))] == ["text of a.txt", "text of b.txt"]
    found = files.text("memory://bucket/run/texts/*.[tm]*", unit="file")
    assert [found[i]["text"] for i in range(len(found))] == ["text of a.txt", "text of b.txt", "text of c.md"]


def test_images_are_found_and_read_in_a_bucket(bucket, tmp_path):
    import PIL.Image

    PIL.Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "x.png")
    for name in ("b/x.png", "a.png", ".hidden/x.png"):
        storage.write(bucket / name, (tmp_path / "x.png").read_bytes())
    storage.write(bucket / "notes.txt", b"")
    images, others = image_files.find(bucket)
    assert [str(path) for path in images] == ["memory://bucket/run/a.png", "memory://bucket/run/b/x.png"]
    assert [path.name for path in others] == ["notes.txt"]
    decoded = image.Decode()({"image": str(images[0])})
    assert np.asarray(decoded["image"]).shape == (4, 6, 3)


# --- metrics --------------------------------------------------------------------------------------


def test_lines_reach_the_bucket_when_a_checkpoint_counts_on_them_or_it_is_time(bucket, monkeypatch):
    monkeypatch.setattr(storage.Mirror, "PAUSE_SECONDS", 1000.0)
    writer = Writer(bucket, 0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0})
    assert read_metrics(bucket / METRICS) == []
    writer.flush()
    assert [row["step"] for row in read_metrics(bucket / METRICS)] == [1, 2, 3]
    monkeypatch.setattr(storage.time, "monotonic", lambda: 1e9)
    writer.write(4, {"train/loss": 1.0})
    assert [row["step"] for row in read_metrics(bucket / METRICS)] == [1, 2, 3, 4]
    writer.close()


def test_the_last_lines_of_a_run_that_fails_are_there(bucket, monkeypatch):
    monkeypatch.setattr(storage.Mirror, "PAUSE_SECONDS", 1000.0)

    def fail() -> None:
        with Writer(bucket, 0) as writer:
            writer.write(1, {"train/loss": 1.0})
            raise ValueError("it fails")

    with pytest.raises(ValueError, match="it fails"):
        fail()
    assert [row["step"] for row in read_metrics(bucket / METRICS)] == [1]


def test_going_on_drops_what_was_written_after_the_checkpoint(bucket):
    writer = Writer(bucket, 0)
    for step in (5, 10, 15):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    again = Writer(bucket, 5, lines=1)
    assert [row["step"] for row in read_metrics(bucket / METRICS)] == [5]
    again.write(10, {"train/loss": 2.0}, {"picture": np.zeros((2, 2, 3), np.uint8)})
    again.close()
    assert [row["step"] for row in read_metrics(bucket / METRICS)] == [5, 10]
    assert [name.split("/")[0] for name in storage.find(bucket)] == ["figures", "metrics.jsonl", *["tensorboard"] * 2]


def test_a_line_that_cannot_be_sent_is_sent_later_and_a_checkpoint_waits_for_it(bucket, monkeypatch, caplog):
    monkeypatch.setattr(storage.Mirror, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(storage.Mirror, "SHARE", 1e9)
    writer = Writer(bucket, 0)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(storage, "put", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
        writer.write(1, {"train/loss": 1.0})
        assert "memory://bucket/run cannot be written to (gone); trying again later" in caplog.text
        with pytest.raises(ConnectionError):
            writer.flush()
    writer.write(2, {"train/loss": 1.0})
    assert [row["step"] for row in read_metrics(bucket / METRICS)] == [1, 2]
    writer.close()


# --- checkpoints that are staged ------------------------------------------------------------------


def save(folder, steps, best=None, **options) -> None:
    from checkpoint_test import state

    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"data": {"position": step}}, best)
    checkpoints.close()


def restore(folder, read_only=False):
    from checkpoint_test import abstract, state

    checkpoints = Checkpoints(folder, read_only=read_only)
    try:
        return checkpoints.restore(abstract(state(0)))
    finally:
        checkpoints.close()


def whole(folder) -> list[str]:
    return sorted({name.split("/")[0] for name in storage.find(folder)})


def test_the_latest_and_the_best_are_kept(bucket):
    from checkpoint_test import assert_same, state

    assert restore(bucket) is None
    save(bucket, [1, 2, 3], best=1)
    assert whole(bucket) == ["1", "2", "3"]
    save(bucket, [4, 5], best=1)
    assert whole(bucket) == ["1", "4", "5"]
    found, extras = restore(bucket)
    assert_same(found, state(5))
    assert extras["data"] == {"position": 5}
    checkpoints = Checkpoints(bucket)
    checkpoints.save(5, state(5), {"evaluated": True}, best=5, replace=True)
    checkpoints.close()
    assert whole(bucket) == ["4", "5"]
    assert restore(bucket)[1]["evaluated"] is True


def test_what_a_killed_process_left_is_no_checkpoint(bucket):
    save(bucket, [10, 20])
    (bucket / "20" / "complete").unlink()  # sent last, deleted first
    assert int(restore(bucket)[0].step) == 10
    save(bucket, [30])
    assert whole(bucket) == ["10", "30"]


def test_damage_falls_back_and_an_outage_does_not(bucket, monkeypatch):
    save(bucket, [10, 20])
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket.fs), "cat_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("gone")))
        patch.setattr(type(bucket), "read_bytes", lambda _: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(OSError, match=r"checkpoint 20 in memory://bucket/run cannot be reached .*gone"):
            restore(bucket)
    assert whole(bucket) == ["10", "20"]
    storage.write(bucket / "20" / "state" / "manifest.ocdbt", b"damage")
    assert int(restore(bucket)[0].step) == 10
    assert whole(bucket) == ["10", "unreadable-20-0"]
    storage.write(bucket / "10" / "state" / "manifest.ocdbt", b"damage")
    with pytest.raises(UnreadableCheckpointError, match=r"none of the checkpoints \[10\]"):
        restore(bucket, read_only=True)


def test_several_processes_are_told_what_takes_their_checkpoints(bucket, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="takes checkpoints of one process; gs:// or a shared folder, of several"):
        Checkpoints(bucket)


def test_a_run_in_memory(bucket, tmp_path):
    """The whole of it, where nothing but fsspec is known of the place."""

    def config():
        found = overrides.load("configs/movie_snippets.py:tiny")
        found.task.model.encoder.num_layers = 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pathlib.Path(__file__).parents[1])
        result = train.run(config(), bucket)
        metrics = evaluate.run(config(), bucket)["metrics"]
    assert metrics == result["metrics"]
    assert json.loads((bucket / "run.json").read_text())["ended"] == "finished"
    assert {"config.json", "tokenizer", "figures", "tensorboard", "result.json"} <= set(whole(bucket))
