import json
import logging
import sys

import numpy as np
import pytest

from configs import movie_snippets
from research import train
from research.configuration import trust
from research.errors import UserError
from research.reporting.trackers import MLflow, Trackers, WandB
from research.reporting.writers import Writer


class Kept:
    """A tracker that keeps what it gets, and fails in the methods that it is told to."""

    def __init__(self, *failing):
        self.failing, self.got = failing, []

    def start(self, workdir, config, known):
        self._note("start", known)
        return known or "run-1"

    def write(self, step, scalars, pictures):
        self._note("write", step, dict(scalars), sorted(pictures))

    def close(self, ended):
        self._note("close", ended)

    def _note(self, method, *arguments):
        if method in self.failing:
            raise ConnectionError("no\nnetwork")
        self.got.append((method, *arguments))


def test_trackers_get_every_line_and_go_on_with_the_run_that_was_begun(tmp_path):
    first, second = Kept(), Kept()
    for tracker, step in ((first, 0), (second, 5)):
        with Writer(tmp_path, step, trackers=Trackers((tracker,), tmp_path, {})) as writer:
            writer.write(
                step + 1, {"train/loss": 0.5, "train/norm": float("inf")}, {"x": np.zeros((2, 2, 3), np.uint8)}
            )
            writer.close()
    assert first.got == [("start", None), ("write", 1, {"train/loss": 0.5}, ["x"]), ("close", True)]
    assert second.got[0] == ("start", "run-1")


def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_others_go_on(tmp_path, caplog):
    broken, late, good = Kept("start"), Kept("write"), Kept()

    def stopped():
        with Writer(tmp_path, 0, trackers=Trackers((broken, late, good), tmp_path, {})) as writer:
            for step in (1, 2):
                writer.write(step, {"train/loss": 0.5})
            raise KeyError

    with caplog.at_level(logging.WARNING), pytest.raises(KeyError):
        stopped()
    assert [entry[0] for entry in good.got] == ["start", "write", "write", "close"]
    assert good.got[-1] == ("close", False)
    assert [record.getMessage() for record in caplog.records] == ["Kept: no network; the run goes on without it"] * 2


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    for module, make in (("wandb", lambda: WandB("x")), ("mlflow", lambda: MLflow("x"))):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=rf"{module} is not installed; pip install -e '.\[{module}\]'"):
            make()


def test_a_folder_of_a_run_with_trackers_is_still_read():
    assert trust._permitted("research.reporting.trackers.WandB")
    assert not trust._permitted("research.reporting.benchmark.run")


def trained(tmp_path, tracker):
    config = movie_snippets.get_config("tiny")
    config.num_epochs, config.num_steps = None, 4
    config.log = {"every_steps": 2, "trackers": [tracker]}
    config.checkpoint.every_steps = 2
    train.run(config, tmp_path / "run")
    return json.loads((tmp_path / "run" / "trackers.json").read_text())


@pytest.mark.peers
def test_weights_and_biases_keeps_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = trained(tmp_path, {"call": "research.reporting.trackers.WandB", "project": "tests"})
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(ids["WandB-0"])
    assert next(folder.glob("*.wandb")).stat().st_size > 1000


@pytest.mark.peers
def test_mlflow_has_the_metrics_of_every_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    ids = trained(tmp_path, {"call": "research.reporting.trackers.MLflow", "experiment": "tests", "uri": uri})
    client = MlflowClient(uri)
    run = client.get_run(ids["MLflow-0"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.01"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == [2, 4]
    assert "test/accuracy" in run.data.metrics
