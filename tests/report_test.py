import json

import pytest

from research import report
from research.reporting import runs


def make_run(path, seed=0, accuracy=0.8, learning_rate=1e-3, **result):
    path.mkdir(parents=True)
    config = {"seed": seed, "optimizer": {"learning_rate": learning_rate, "clip_norm": 1.0}, "ops": [{"call": "[b]x"}]}
    run = {"command": "python -m research.main", "git": {"commit": "0123456789abcdef", "dirty": False}, "seed": seed}
    run |= {"python": "3.11.0", "packages": {"jax": "0.10.2"}, "start": "2026-01-02T03:04:05+00:00"}
    rows = [{"step": s, "train/loss": 1 / s} for s in range(1, 20)] + [{"step": 20, "test/accuracy": accuracy}]
    result = {"step": 20, "metrics": {"test/accuracy": accuracy}, "examples_per_second": 50.0} | result
    for name, value in (("config", config), ("run", run), ("result", result)):
        (path / f"{name}.json").write_text(json.dumps(value))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def line_of(text, word):
    return next(line for line in text.splitlines() if word in line)


def test_seeds_are_grouped_and_only_what_differs_is_shown(tmp_path, capsys):
    for seed, accuracy in enumerate((0.80, 0.82, 0.84)):
        make_run(tmp_path / f"slow{seed}", seed, accuracy)
    make_run(tmp_path / "fast", 0, 0.9, learning_rate=2e-3)
    assert report.main(["slow0", "slow1", "slow2", "fast", "--figure", "out/figure.png"]) == 0
    printed = capsys.readouterr().out
    assert "82.00 % ± 2.00" in line_of(printed, "test/accuracy")
    assert "90.00 %" in line_of(printed, "test/accuracy")
    assert "0.001" in line_of(printed, "optimizer.learning_rate")
    assert "0.002" in line_of(printed, "optimizer.learning_rate")
    assert "0, 1, 2" in line_of(printed, "seed ")
    assert "slow0 and 2 more seeds" in printed
    assert "clip_norm" not in printed
    assert (tmp_path / "out/figure.png").stat().st_size > 1000


def test_groups_by_keys_with_a_page_of_one_file(tmp_path, capsys):
    for seed, accuracy in ((1, 0.82), (0, 0.80), (2, 0.87)):
        make_run(tmp_path / f"slow{seed}", seed, accuracy)
        make_run(tmp_path / f"fast{seed}", seed, accuracy + 0.05 + seed / 100, learning_rate=2e-3)
    runs = sorted(path.name for path in tmp_path.iterdir())
    arguments = [*runs, "--group=config.optimizer.learning_rate", "--html=pages/comparison.html"]
    assert report.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "learning_rate=0.002" in printed
    # 5, 6 and 7 points, by hand: 4.302653 times 1 / sqrt(3) is 2.48.
    assert "-6.00 points (-8.48 to -3.52; 3 pairs)" in line_of(printed.partition("Differences")[2], "test/accuracy")
    text = (tmp_path / "pages/comparison.html").read_text()
    assert "-6.00 points (-8.48 to -3.52; 3 pairs)" in text
    assert "page: pages/comparison.html (" in printed


def test_a_run_that_lacks_a_metric_is_named(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", 1, metrics={"test/f1": 0.5})
    assert report.main(["a", "b", "--metrics", "f1|accuracy"]) == 0
    printed = capsys.readouterr().out
    assert "Without a finite test/f1: a" in printed
    assert "Without a finite test/accuracy: b" in printed


def test_metrics_chooses_by_regular_expression(tmp_path, capsys):
    make_run(tmp_path / "a")
    assert report.main(["a", "--metrics", "accuracy$"]) == 0
    printed = capsys.readouterr().out
    assert "test/accuracy" in printed
    assert "examples_per_second" not in printed
    assert (tmp_path / "comparison.png").exists()


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path):
    found = [runs.load(make_run(tmp_path / side / "seed-0")) for side in ("ours", "theirs")]
    assert runs.labels(found) == ["ours/seed-0", "theirs/seed-0"]


def test_flatten_goes_into_lists_of_mappings_only():
    node = {"a": {"b": 1}, "ops": [{"call": "x"}], "names": ["p", "q"], "none": {}}
    assert runs.flatten(node) == {"a.b": 1, "ops.0.call": "x", "names": ["p", "q"], "none": {}}


@pytest.mark.parametrize(
    ("break_it", "arguments", "message"),
    [
        (lambda run: None, ["rum"], "there is no run folder rum; did you mean 'run'?"),
        (lambda run: (run / "result.json").unlink(), ["run"], "has not finished (it has no result.json)"),
        (lambda run: (run / "config.json").unlink(), ["run"], "holds no run (it has no config.json)"),
        (lambda run: (run / "run.json").unlink(), ["run"], "run has no run.json"),
        (lambda run: (run / "result.json").write_text('{"step": 1'), ["run"], "result.json is not JSON"),
        (lambda run: (run / "result.json").write_text("[1]"), ["run"], "does not hold a JSON object"),
        (lambda run: (run / "result.json").write_text("{}"), ["run"], "result.json has no 'metrics'"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"st'), ["run"], "metrics.jsonl, line 2, is not"),
        (lambda run: None, ["run", "run"], "run is named twice"),
        (lambda run: None, ["run", "--metrics", "["], "'[' is not a regular expression"),
        (lambda run: None, ["run", "--metrics", "test/acuracy"], "did you mean 'test/accuracy'?"),
        (lambda run: None, ["run", "--group=optimizer.lerning_rate"], "did you mean 'optimizer.learning_rate'?"),
        (lambda run: None, ["run", "--group=,"], "--group: name keys of the config"),
        (lambda run: None, ["run", "--html=run"], "--html: run is a folder; name a file"),
        (lambda run: None, ["--ledger", "--html=x"], "--html cannot be combined with --ledger"),
        (lambda run: None, [], "name the folders of finished runs"),
        (lambda run: None, ["--ledger", "run"], "--ledger takes no RUN"),
        (lambda run: None, ["run", "--into", "x"], "--into cannot be combined with comparing runs"),
        (lambda run: None, ["--ledger", "--figure", "x"], "--figure cannot be combined with --ledger"),
        (lambda run: None, ["--record", "run"], "--record needs --into"),
        (lambda run: None, ["--recrod", "run"], "--recrod"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, break_it, arguments, message):
    break_it(make_run(tmp_path / "run"))
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
