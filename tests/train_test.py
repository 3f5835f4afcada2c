"""Whole runs on a tiny model, in this process."""

import json
import math
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from configs import movie_snippets
from research import evaluate, train
from research.errors import UserError
from research.evaluate import EvaluationError
from research.reporting.meter import NonFiniteError
from research.runtime.preemption import PreemptedError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Every run builds a step of its own; only the first of each shape is compiled."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def config(**sections) -> ConfigDict:
    """The tiny config, tinier, for 12 steps."""
    tiny = movie_snippets.get_config("tiny")
    tiny.num_epochs, tiny.num_steps = None, 12
    tiny.task.model.encoder.update(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16)
    for node in (tiny.data, tiny.evals.test.data):
        node.length_buckets = 1
    tiny.log = {"every_steps": 4, "evaluate_every_steps": 0}
    tiny.checkpoint = {"every_steps": 5, "keep": 2}
    for name, section in sections.items():
        with tiny.unlocked():
            tiny[name].update(section)
    return tiny


def files(workdir: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in workdir.rglob("*")}


def steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def scripted(monkeypatch):
    """Makes evaluations return the given losses in turn; an exception is raised."""

    def script(*losses) -> None:
        left = list(losses)

        def scores(evaluators, params, check=lambda: None):
            value = left.pop(0)
            if isinstance(value, Exception):
                raise value
            return {"test/loss": value}, {}

        monkeypatch.setattr(evaluate, "scores", scores)

    return script


def test_a_run_fills_its_folder_and_a_second_one_changes_nothing(tmp_path, capsys):
    result = train.run(config(), tmp_path)
    assert result["step"] == 12
    assert result["metrics"].keys() == {"test/loss", "test/accuracy"}
    assert result["train_seconds"] > 0
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert {p.name for p in tmp_path.iterdir()} == {
        *("config.json", "run.json", "metrics.jsonl", "result.json"),
        *("checkpoints", "tensorboard", "tokenizer", "figures"),
    }
    assert steps(tmp_path) == [10, 12]
    assert [row["step"] for row in rows(tmp_path)] == [4, 8, 12, 12]
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = files(tmp_path)
    capsys.readouterr()
    assert train.run(config(), tmp_path) == result
    assert files(tmp_path) == before
    assert "finished before" in capsys.readouterr().err


def test_what_is_computed_may_not_change_on_the_way(tmp_path, scripted):
    scripted(PreemptedError())
    with pytest.raises(PreemptedError):
        train.run(config(), tmp_path)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"config\.optimizer\.learning_rate: .* with 0\.01, this one has 0\.1; use"):
        train.run(config(optimizer={"learning_rate": 0.1}), tmp_path)
    assert files(tmp_path) == before
    scripted(1.0)
    changed = config(log={"every_steps": 3}, checkpoint={"every_steps": 2})
    assert train.run(changed, tmp_path)["metrics"] == {"test/loss": 1.0}


@pytest.mark.parametrize(
    ("mode", "losses", "best", "stopped"),
    [
        ("min", [0.5, 0.4, 0.4, 0.6, 0.1], 4, 8),
        ("max", [0.5, 0.4, 0.4, 0.6, 0.1], 2, 6),
        ("min", [math.nan, 0.7, math.nan, 0.6, 0.8, 0.9], 8, 12),
        ("min", [math.nan, math.nan], None, 4),
    ],
)
def test_patience_ends_a_run_and_the_best_checkpoint_stays(mode, losses, best, stopped, tmp_path, scripted):
    scripted(*losses)
    options = {"best": "test/loss", "mode": mode, "patience": 2, "every_steps": 1}
    stopping = config(log={"evaluate_every_steps": 2}, checkpoint=options)
    result = train.run(stopping, tmp_path)
    assert result["step"] == stopped
    if best is None:
        assert "best" not in result
    else:
        assert result["best"] == {"test/loss": {"value": losses[best // 2 - 1], "step": best}}
    assert steps(tmp_path) == sorted({best, stopped - 1, stopped} - {None})
    scripted(0.3)
    assert evaluate.run(stopping, tmp_path)["step"] == (stopped if best is None else best)


def test_an_interrupted_evaluation_is_done_again_and_its_best_is_kept(tmp_path, scripted):
    evaluating = config(log={"evaluate_every_steps": 4}, checkpoint={"best": "test/loss", "mode": "min"})
    scripted(0.5, PreemptedError())
    with pytest.raises(PreemptedError, match="stopped at step 8; run the same command to go on"):
        train.run(evaluating, tmp_path)
    assert steps(tmp_path) == [4, 5, 8]
    scripted(0.1, 0.3)
    assert train.run(evaluating, tmp_path)["best"] == {"test/loss": {"value": 0.1, "step": 8}}
    assert steps(tmp_path) == [8, 10, 12]
    assert [(row["step"], row["test/loss"]) for row in rows(tmp_path) if "test/loss" in row] == [
        *((4, 0.5), (8, 0.1), (12, 0.3))
    ]


def test_an_evaluator_that_fails_costs_nothing_that_was_trained(tmp_path, scripted):
    evaluating = config(log={"evaluate_every_steps": 4}, checkpoint={"every_steps": 100})
    scripted(0.5, EvaluationError("config.evals.test failed"))
    with pytest.raises(
        EvaluationError, match=r"config\.evals\.test failed; the checkpoint of step 8 is kept, and the same"
    ):
        train.run(evaluating, tmp_path)
    assert steps(tmp_path)[-1] == 8
    scripted(0.1, 0.3)
    assert train.run(evaluating, tmp_path)["metrics"] == {"test/loss": 0.3}
    assert [(row["step"], row["test/loss"]) for row in rows(tmp_path) if "test/loss" in row] == [
        *((4, 0.5), (8, 0.1), (12, 0.3))
    ]


def test_the_last_step_is_saved_before_it_is_evaluated(tmp_path, scripted, monkeypatch):
    seen = []
    scripted(0.5)
    monkeypatch.setattr(
        evaluate, "scores", lambda *_: seen.extend((tmp_path / "checkpoints").iterdir()) or ({"test/loss": 0.5}, {})
    )
    train.run(config(), tmp_path)
    assert seen
    assert any(path.name.startswith("12") for path in seen)


def test_milestones_are_never_deleted(tmp_path):
    train.run(config(checkpoint={"every_steps": 2, "keep": 1, "keep_every": 4}), tmp_path)
    assert steps(tmp_path) == [4, 8, 12]
    with pytest.raises(UserError, match=r"keep_every: 3 is not a multiple of every_steps, 2"):
        train.run(config(checkpoint={"every_steps": 2, "keep_every": 3}), tmp_path / "other")


def test_a_best_metric_that_no_evaluation_gives_is_named(tmp_path, scripted):
    scripted(0.5)
    with pytest.raises(
        UserError, match=r"config.checkpoint.best: no evaluation gives 'test/los'; did you mean 'test/l"
    ):
        train.run(config(checkpoint={"best": "test/los"}), tmp_path)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(tmp_path):
    options = {"learning_rate": 1e30, "schedule": "constant", "warmup": 0.1}  # the rate of the first step is 0
    exploding = config(optimizer=options, checkpoint={"every_steps": 1})
    with pytest.raises(NonFiniteError, match=r"at step 3; the last good checkpoint is kept"):
        train.run(exploding, tmp_path)
    assert steps(tmp_path) == [1, 2]
    assert json.loads((tmp_path / "run.json").read_text())["ended"].startswith("NonFiniteError")
    assert not (tmp_path / "result.json").exists()
    assert evaluate.run(exploding, tmp_path)["step"] == 2


def test_lines_tell_operations_and_waiting_and_some_steps_are_traced(tmp_path, capsys):
    train.run(config(), tmp_path, profile_steps="5:7")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [row for row in rows if "train/loss" in row]
    assert all(row["train/operations_per_second"] > 0 and 0 <= row["train/waiting_share"] < 1 for row in lines)
    assert not any("train/mfu" in row for row in lines)  # nobody says what a CPU's peak is
    assert "traced the steps 5 to 6" in capsys.readouterr().err
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert trace.stat().st_size > 1000


@pytest.mark.parametrize("steps", ["5", "7:5", "a:b"])
def test_steps_to_trace_are_a_range(steps, tmp_path):
    with pytest.raises(UserError, match=f"--profile_steps: '{steps}' is not FIRST:END"):
        train.run(config(), tmp_path, profile_steps=steps)


def test_a_run_that_stops_where_it_is_told_ends_as_one_that_never_did(tmp_path):
    whole = train.run(config(), tmp_path / "whole")
    for stop, step in ((0.3, 4), ("0.3", 4), ("10", 10)):  # the second begins where it is to stop
        with pytest.raises(PreemptedError, match=f"stopped at step {step}, as --stop_at says"):
            train.run(config(), tmp_path / "parts", stop_at=stop)
        assert rows(tmp_path / "parts")[-1]["step"] == step
        assert "test/loss" in rows(tmp_path / "parts")[-1]
    parts = train.run(config(), tmp_path / "parts", stop_at=500)  # beyond the end
    assert parts["metrics"] == whole["metrics"]
    last = [[row["train/loss"] for row in rows(tmp_path / name) if "train/loss" in row] for name in ("whole", "parts")]
    assert last[0][-1] == last[1][-1]
    for stop in ("0", "-1", "2.5", "soon"):
        with pytest.raises(UserError, match=f"--stop_at: {stop} is neither a step nor a share"):
            train.run(config(), tmp_path / "never", stop_at=stop)
