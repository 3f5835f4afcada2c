import json
import os

import pytest

from research.errors import UserError
from research.reporting import record
from research.reporting.record import Record, differences, load_config, read_json, write_json
from research.runtime.preemption import PreemptedError

CONFIG = {"seed": 3, "optimizer": {"learning_rate": 0.1}, "log": {"every_steps": 5}, "mesh": {"data": 1}}


def run_json(workdir) -> dict:
    return json.loads((workdir / "run.json").read_text())


def test_a_run_says_what_it_was_and_how_it_ended(tmp_path):
    workdir = tmp_path / "new" / "run"
    with Record(workdir, CONFIG) as attempt:
        assert run_json(workdir)["ended"] == "running"
        attempt.note(resumed_from=None)
    found = run_json(workdir)
    assert found["ended"] == "finished"
    assert found["start"] <= found["end"]
    assert found["seed"] == 3
    assert found["packages"].keys() >= {"jax", "flax", "optax", "orbax-checkpoint"}
    assert found["devices"]["count"] >= 1
    assert len(found["git"]["commit"]) == 40
    assert found["attempts"][0]["resumed_from"] is None
    assert load_config(workdir).to_dict() == CONFIG


@pytest.mark.parametrize(
    ("error", "ended"), [(PreemptedError("saved"), "preempted"), (ValueError("too wide"), "ValueError: too wide")]
)
def test_an_error_is_recorded_and_goes_on(error, ended, tmp_path):
    with pytest.raises(type(error)), Record(tmp_path, CONFIG):
        raise error
    assert run_json(tmp_path)["ended"] == ended


def test_attempts_add_up_and_one_without_an_end_was_killed(tmp_path):
    Record(tmp_path, CONFIG).__enter__()
    with pytest.raises(PreemptedError), Record(tmp_path, CONFIG):
        raise PreemptedError
    with Record(tmp_path, CONFIG) as attempt:
        attempt.note(resumed_from=20)
    found = run_json(tmp_path)
    assert [a["ended"] for a in found["attempts"]] == ["killed", "preempted", "finished"]
    assert found["start"] == found["attempts"][0]["start"]
    assert found["attempts"][2]["resumed_from"] == 20


def test_a_start_that_failed_does_not_hold_its_folder(tmp_path):
    with pytest.raises(OSError, match="no such weights"), Record(tmp_path, CONFIG):
        raise OSError("no such weights")
    mended = CONFIG | {"optimizer": {"learning_rate": 0.2}}
    with Record(tmp_path, mended):
        pass
    assert read_json(tmp_path / "config.json") == mended


def test_another_config_is_the_users_mistake_and_changes_nothing(tmp_path):
    with Record(tmp_path, CONFIG):
        pass
    before = (tmp_path / "config.json").read_text()
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"config\.optimizer\.learning_rate: .* holds a run with 0\.1, this one has 0\.2"
    ):
        Record(tmp_path, CONFIG | {"optimizer": {"learning_rate": 0.2}})
    assert (tmp_path / "config.json").read_text() == before


def test_logging_saving_and_devices_may_change(tmp_path):
    with Record(tmp_path, CONFIG):
        pass
    changed = CONFIG | {"log": {"every_steps": 50}, "mesh": {"data": 4}, "checkpoint": {"keep": 9}}
    with Record(tmp_path, changed):
        pass
    assert load_config(tmp_path).to_dict() == changed


def test_differences_go_into_sections_and_name_missing_keys():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4, "d": 3}, "e": 5}) == [
        ("a", 1, None),
        ("b.c", 2, 4),
        ("e", None, 5),
    ]


def test_a_folder_without_a_run(tmp_path):
    assert read_json(tmp_path / "result.json") is None
    with pytest.raises(UserError, match="holds no run"):
        load_config(tmp_path)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        Record(tmp_path, CONFIG)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"step": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"step": 2})
    assert read_json(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_does_not_hide_what_stopped_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    stopped, finished = Record(tmp_path / "stopped", CONFIG), Record(tmp_path / "finished", CONFIG)
    for attempt in (stopped, finished):
        attempt.__enter__()
    monkeypatch.setattr(record, "write_json", full)
    error = PreemptedError()
    stopped.__exit__(PreemptedError, error, None)  # and the error goes on
    with pytest.raises(OSError, match="No space left"):
        finished.__exit__(None, None, None)
