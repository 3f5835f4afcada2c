"""Sweeps: which points there are, and that running them survives failures, signals and repeats."""

import json
import pathlib
import re
import signal
import subprocess
import sys
from typing import ClassVar

import pytest

from research import main, sweep
from research.configuration import overrides, sweeps
from research.configuration.sweeps import Sweep, choice, grid, log_uniform, points, sample, seeds, uniform
from research.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import movie_snippets
from research.configuration.sweeps import grid, points, seeds

def get_config(variant=""):
    config = movie_snippets.get_config("tiny")
    config.task.model.encoder.update(num_layers=1, intermediate_size=32)
    config.log.evaluate_every_steps = 0
    return config

def get_sweep():
    return SWEEP
"""


def test_operators_make_the_points_that_they_say():
    both = grid({"a.x": (1, 2), "b.y": ("p", "q")})
    assert [tuple(point.values()) for point in both] == [(1, "p"), (1, "q"), (2, "p"), (2, "q")]
    assert len(both * seeds(3)) == 12
    assert list(grid({"a": (1,)}) * points({"a": 2})) == [{"a": 2}]
    assert list(points({"a": 1}) + points({"b": 2})) == [{"a": 1}, {"b": 2}]
    with pytest.raises(UserError, match="twice"):
        grid({"a": (1, 2)}) + points({"a": 2})
    with pytest.raises(UserError, match="no points"):
        Sweep(())


def test_random_points_are_a_function_of_the_seed_and_the_first_stay_when_there_are_more():
    values = {"rate": log_uniform(1e-5, 1e-1), "share": uniform(0.0, 0.5), "kind": choice(("a", "b"))}
    many = list(sample(200, values))
    assert many[:5] == list(sample(5, values))
    assert many[:5] != list(sample(5, values, seed=1))
    assert all(1e-5 <= p["rate"] <= 1e-1 and 0 <= p["share"] <= 0.5 and p["kind"] in "ab" for p in many)
    below = sum(p["rate"] < 1e-3 for p in many)
    assert 80 < below < 120  # half of them, as the logarithm is uniform
    with pytest.raises(UserError, match="above 0"):
        log_uniform(0, 1)


def test_names_are_short_readable_and_differ():
    sweep_of_two = grid({"optimizer.learning_rate": (1e-3,), "task.label": ("a/b", "a b")})
    names = sweeps.names(sweep_of_two)
    assert all(name.startswith("learning_rate=0.001,label=a_b") and "/" not in name for name in names)
    assert len(set(names)) == 2
    alike = sweeps.names(grid({"a.size": (1,), "b.size": (2,)}))
    assert alike == ["a.size=1,b.size=2"]
    long = sweeps.names(grid({f"key{i}": ("x" * 30,) for i in range(9)}))
    assert len(long[0]) < 140


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "configs").glob("*.py") if "def get_sweep" in p.read_text()))
def test_the_sweeps_of_configs_fit_them(path):
    for point in overrides.load_sweep(str(path)):
        overrides.apply(overrides.load(str(path)), [(key, sweeps.as_text(value)) for key, value in point.items()])


def write(folder, points, config=CONFIG):
    path = folder / "config.py"
    path.write_text(config.replace("SWEEP", points))
    return str(path)


@pytest.mark.parametrize(
    ("points", "flags", "message"),
    [
        ('grid({"optimizer.learning_rat": (1,)})', [], "did you mean 'learning_rate'"),
        ("seeds(2)", ["--shard=3/2"], "--shard: '3/2' is not like 3/16"),
        ("seeds(2)", ["--parallel=0"], "--parallel: 0 is not a positive integer"),
        ("seeds(2)", ["--halving=1", "--metric=test/loss"], "--halving: 1 is not a number above 1"),
        ("seeds(2)", ["--halving=2"], "--metric: say by which metric"),
        ("seeds(2)", ["--halving=2", "--shard=1/2"], "cannot be combined with --shard"),
        ("seeds(2)", ["--metric=test/loss:mni"], "did you mean 'min'"),
        ("[1]", [], "get_sweep in .* returns a list, not a Sweep"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(tmp_path, capsys, points, flags, message):
    file = write(tmp_path, points)
    workdir = tmp_path / "sweep"
    assert main.main(["--mode=sweep", f"--config={file}", f"--workdir={workdir}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (workdir / "logs").exists()


def test_a_config_without_a_sweep_says_what_to_write(tmp_path, capsys):
    assert main.main(["--mode=sweep", "--config=configs/glue.py:sst2", f"--workdir={tmp_path}"]) == 2
    assert "configs/glue.py defines no get_sweep(); see research/configuration/sweeps.py" in capsys.readouterr().err


class Process:
    """Stands for a process of `research.main`: it writes what a run would, at once."""

    started: ClassVar[list[list[str]]] = []

    def __init__(self, command, stdout, env, **_):
        values = dict(part.removeprefix("--").split("=", 1) for part in command if part.startswith("--"))
        self.started.append(command)
        self.pid, self.folder = 0, pathlib.Path(values["workdir"])
        rate, share = float(values["config.optimizer.learning_rate"]), float(values.get("stop_at", 1.0))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.status = 1 if rate > 1 else 0 if share == 1.0 else 75
        if self.status == 1:
            print("error: the loss is nan", file=stdout, flush=True)
            return
        metrics = {"test/loss": rate * (2 - share)}
        if self.status == 0:
            (self.folder / "result.json").write_text(json.dumps({"step": 30, "metrics": metrics}))
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": round(30 * share), **metrics}) + "\n")

    def wait(self):
        return self.status

    def terminate(self):
        self.status = 75


@pytest.fixture
def started(monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep.os, "sched_setaffinity", lambda pid, cores: None, raising=False)
    monkeypatch.setattr(Process, "started", [])
    return Process.started


def run(tmp_path, points, *flags):
    arguments = ["--mode=sweep", f"--config={write(tmp_path, points)}", f"--workdir={tmp_path / 'sweep'}", *flags]
    return main.main(arguments), tmp_path / "sweep"


RATES = "+".join(f'points({{"optimizer.learning_rate": {rate}}})' for rate in (0.4, 0.1, 9.0, 0.3, 0.2))


def test_a_failing_point_stops_no_other_and_only_it_is_tried_again(tmp_path, capsys, started):
    status, folder = run(tmp_path, RATES)
    assert status == 1
    error = capsys.readouterr().err
    assert "learning_rate=9.0: failed: error: the loss is nan" in error
    assert error.splitlines()[-1].startswith("error: 1 of 5 points failed: learning_rate=9.0; what they printed")
    states = {
        name: entry["status"] for name, entry in json.loads((folder / "sweep.json").read_text())["points"].items()
    }
    assert sorted(states.values()) == ["failed", *["finished"] * 4]
    assert len(started) == 5
    run(tmp_path, RATES)
    assert len(started) == 6
    assert "learning_rate=9.0" in started[-1][-1]


def test_shards_have_every_point_once_and_overrides_reach_all_but_what_a_point_sets(tmp_path, started):
    flags = ["--config.batch_size=4", "--config.optimizer.learning_rate=7.0"]
    for shard in ("1/2", "2/2"):
        run(tmp_path, RATES, f"--shard={shard}", *flags)
    rates = [next(p for p in command if "learning_rate" in p and "workdir" not in p) for command in started]
    assert sorted(rates) == [f"--config.optimizer.learning_rate={rate}" for rate in (0.1, 0.2, 0.3, 0.4, 9.0)]
    assert all("--config.batch_size=4" in command for command in started)
    assert {path.name for path in (tmp_path / "sweep").glob("*.json")} == {"sweep-1-of-2.json", "sweep-2-of-2.json"}


def test_halving_lets_the_best_go_on_to_the_end(tmp_path, capsys, started):
    status, folder = run(tmp_path, RATES, "--halving=2", "--metric=test/loss")
    assert status == 1  # of the one that fails
    entries = json.loads((folder / "sweep.json").read_text())["points"]
    ended = {name.removeprefix("learning_rate="): entry["status"] for name, entry in entries.items()}
    assert ended == {
        **{"0.1": "finished", "0.2": "finished", "0.3": "stopped early", "0.4": "stopped early", "9.0": "failed"}
    }
    shares = [part for command in started for part in command if part.startswith("--stop_at")]
    assert shares.count("--stop_at=0.25") == 5
    assert shares.count("--stop_at=0.5") == 3


@pytest.mark.slow
def test_sigterm_saves_the_points_that_run_and_the_same_command_ends_them(tmp_path):
    file = write(tmp_path, "seeds(3)")
    command = [sys.executable, "-m", "research.main", "--mode=sweep", f"--config={file}"]
    command += [f"--workdir={tmp_path / 'sweep'}", "--metric=test/loss", "--parallel=2", "--config.num_epochs=40"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    logs = tmp_path / "sweep" / "logs"
    while process.poll() is None and not any("step 5/" in p.read_text() for p in logs.glob("*.txt")):
        pass
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert error.splitlines()[-1] == "preempted: the points that were running are saved; run the same command to go on"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    assert [entry["status"] for entry in points.values()] == ["finished"] * 3
    assert any("resumed from step" in path.read_text() for path in logs.glob("*.txt"))
