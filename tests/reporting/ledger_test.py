import json
import pathlib
import shutil

import pytest
from report_test import make_run

from research import report
from research.errors import UserError
from research.reporting import ledger, runs

PROJECT = pathlib.Path(__file__).parents[2]
CLAIM = """
title = "A title"
claim = "A claim"
source = "A paper, table 1"
metric = "test/accuracy"
runs_per_arm = 2
hardware = "a laptop"
reduced = "{reduced}"
commands = "make it"
curves = ["train/loss"]
[published]
value = 0.85
what = "table 1"
checked = true
[arms]
ours = "this project"
theirs = "the other"
[rule]
why = "Because."
{rule}
"""
AT_LEAST = 'kind = "at_least"\narm = "ours"\nagainst = "theirs"\ntolerance = 0.01'


def make_experiment(root, rule=AT_LEAST, reduced="", ours=(0.84, 0.86), theirs=(0.85, 0.85), name="one"):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "claim.toml").write_text(CLAIM.format(rule=rule, reduced=reduced))
    for arm, values in (("ours", ours), ("theirs", theirs)):
        for seed, value in enumerate(values):
            make_run(folder / "runs" / arm / f"seed-{seed}", seed, value)
    return folder


def make_readmes(root):
    readmes = root.parent / "README.md", root / "README.md"
    for readme in readmes:
        readme.write_text(f"before\n{ledger.BEGIN}\nold\n{ledger.END}\nafter\n")
    return readmes


def rule(kind, against="theirs", **numbers):
    lines = [f'kind = "{kind}"', 'arm = "ours"', f'against = "{against}"']
    return "\n".join(lines + [f"{key} = {value}" for key, value in numbers.items()])


@pytest.mark.parametrize(
    ("written", "ours", "verdict"),
    [
        (rule("at_least", tolerance=0.01), (0.84, 0.842), "reproduced"),
        (rule("at_least", tolerance=0.01), (0.83, 0.84), "not reproduced"),
        (rule("at_least", tolerance=0.01), (0.99, 0.99), "reproduced"),
        (rule("at_most", tolerance=0.01), (0.99, 0.99), "not reproduced"),
        (rule("at_most", tolerance=0.01), (0.86, 0.855), "reproduced"),
        (rule("within", "published", tolerance=0.02), (0.84, 0.85), "reproduced"),
        (rule("within", "published", tolerance=0.02), (0.89, 0.88), "not reproduced"),
        (rule("ratio", minimum=1.0), (0.85, 0.86), "reproduced"),
        (rule("ratio", minimum=1.1), (0.85, 0.86), "not reproduced"),
        (rule("ratio", "published", minimum=1.0), (0.85, 0.86), "reproduced"),
        (rule("at_least", tolerance=0.01), (0.99,), "not run"),
    ],
)
def test_verdicts_follow_from_the_records(tmp_path, written, ours, verdict):
    assert ledger.load(make_experiment(tmp_path / "experiments", written, ours=ours)).verdict == verdict


def test_a_reduced_experiment_is_reproduced_at_reduced_scale_or_not_at_all(tmp_path):
    good = make_experiment(tmp_path, reduced="one layer of twelve")
    bad = make_experiment(tmp_path, reduced="one layer of twelve", ours=(0.1, 0.1), name="bad")
    assert ledger.load(good).verdict == "reproduced at reduced scale"
    assert ledger.load(bad).verdict == "not reproduced"


def test_a_ratio_is_the_median_over_pairs(tmp_path):
    written = rule("ratio", minimum=2.0)
    entry = ledger.load(make_experiment(tmp_path, written, ours=(0.2, 0.9, 0.8), theirs=(0.1, 0.3, 0.1)))
    assert entry.reason.startswith("this project / the other: 3.00 (2.00 to 8.00)")
    with pytest.raises(UserError, match="unpaired: seed-2"):
        ledger.load(make_experiment(tmp_path, written, ours=(0.2, 0.9, 0.8), name="unpaired"))


def test_pages_tables_and_figures_are_written(tmp_path, capsys):
    root = tmp_path / "experiments"
    folder, unrun = make_experiment(root), make_experiment(root, ours=(), theirs=(), name="two")
    (folder / "claim.toml").write_text("headline = true\n" + (folder / "claim.toml").read_text())
    readme, overview = make_readmes(root)
    assert report.main(["--ledger", "--root", str(root)]) == 0
    assert "not run" in capsys.readouterr().out
    page = (folder / "README.md").read_text()
    assert "**Verdict: reproduced.** This project 85.00 %, the other 85.00 %: a difference of +0.00 points" in page
    assert "| this project | 2 | 85.00 % | 1.41 | 84.00 %, 86.00 % |" in page
    assert "85.00 % (table 1; checked at its source)" in page
    assert "`0123456789`" in page
    assert (folder / "results.png").exists()
    assert (folder / "curves.png").exists()
    assert "results.png" not in (unrun / "README.md").read_text()
    assert not (unrun / "results.png").exists()
    texts = [path.read_text() for path in (readme, overview)]
    for text in texts:
        assert text.startswith(f"before\n{ledger.BEGIN}\n| experiment |")
        assert text.endswith(f"|\n{ledger.END}\nafter\n")
        assert "old" not in text
    assert "[A title](experiments/one/README.md)" in texts[0]
    assert "two/README.md" not in texts[0]  # no headline
    assert "[A title](one/README.md)" in texts[1]
    assert "[A title](two/README.md)" in texts[1]
    report.main(["--ledger", "--root", str(root)])
    assert [path.read_text() for path in (readme, overview)] == texts


def test_a_readme_without_markers_is_an_error_and_nothing_is_written(tmp_path, capsys):
    folder = make_experiment(tmp_path / "experiments")
    readme, _ = make_readmes(tmp_path / "experiments")
    readme.write_text("no markers")
    assert report.main(["--ledger", "--root", str(tmp_path / "experiments")]) == 2
    assert "lacks the lines '<!-- ledger:begin -->'" in capsys.readouterr().err
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hardware", "hardwear", "unknown key 'hardwear'; did you mean 'hardware'?"),
        ('hardware = "a laptop"\n', "", "'hardware' is missing"),
        ("runs_per_arm = 2", 'runs_per_arm = "2"', "runs_per_arm: str is not an instance of int"),
        ("tolerance", "tolerence", "unknown key 'rule.tolerence'; did you mean 'tolerance'?"),
        ('arm = "ours"', 'arm = "our"', "rule.arm: there is no arm 'our'; did you mean 'ours'?"),
        (
            "tolerance = 0.01",
            "minimum = 2.0",
            "a rule of kind 'at_least' needs 'tolerance' and must not have 'minimum'",
        ),
        ('"at_least"', '"atleast"', "rule.kind"),
        ("checked = true", "checked", "is not valid TOML"),
    ],
)
def test_mistakes_in_a_claim_are_named(tmp_path, old, new, message):
    path = make_experiment(tmp_path) / "claim.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as error:
        ledger.load(path.parent)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_metric_that_a_run_did_not_end_with_is_named(tmp_path):
    path = make_experiment(tmp_path) / "claim.toml"
    path.write_text(path.read_text().replace('"test/accuracy"', '"test/acuracy"'))
    with pytest.raises(UserError, match="ended without 'test/acuracy'; did you mean 'test/accuracy'"):
        ledger.load(path.parent)


def test_a_folder_of_no_arm_is_an_error(tmp_path):
    folder = make_experiment(tmp_path)
    make_run(folder / "runs" / "our" / "seed-0")
    with pytest.raises(UserError, match=r"matches no arm of claim\.toml; did you mean 'ours'"):
        ledger.load(folder)


def test_record_copies_into_an_arm_and_replaces(tmp_path, capsys):
    folder = make_experiment(tmp_path / "experiments", ours=())
    for accuracy in (0.5, 0.6):
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        made = [make_run(tmp_path / "work" / f"seed-{seed}", seed, accuracy) for seed in (0, 1)]
        assert report.main(["--record", *map(str, made), "--into", str(folder / "ours")]) == 0
    entry = ledger.load(folder)
    assert [run.number("test/accuracy") for run in entry.arms["ours"]] == [0.6, 0.6]
    assert [run.config["seed"] for run in entry.arms["ours"]] == [0, 1]
    assert sorted(path.name for path in (folder / "runs/ours/seed-0").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "result.json",
        "run.json",
    ]


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ("one/our", "one has no arm 'our'; did you mean 'ours'?"),
        ("one", "one has no arm ''; there are: ours, theirs"),
        ("onn", "onn is not an experiment (it has no claim.toml); did you mean 'one'?"),
    ],
)
def test_record_names_what_is_wrong_with_its_target(tmp_path, into, message):
    make_experiment(tmp_path / "experiments")
    run = runs.load(make_run(tmp_path / "seed-0"))
    with pytest.raises(UserError) as error:
        ledger.record([run], tmp_path / "experiments" / into)
    assert message in str(error.value)


def test_record_refuses_runs_of_the_same_name(tmp_path):
    folder = make_experiment(tmp_path / "experiments")
    found = [runs.load(make_run(tmp_path / side / "seed-0")) for side in ("a", "b")]
    with pytest.raises(UserError, match="need different names"):
        ledger.record(found, folder / "ours")


def test_thinning_keeps_evaluations_and_the_ends():
    rows = [{"step": s, "train/loss": 1.0} for s in range(5000)]
    for step in range(0, 5000, 100):
        rows.insert(step, {"step": step, "test/accuracy": 0.5})
    kept = ledger.thin(rows)
    assert len(kept) <= ledger.MOST_LINES
    assert [row for row in kept if "test/accuracy" in row] == [row for row in rows if "test/accuracy" in row]
    losses = [row["step"] for row in kept if "train/loss" in row]
    assert losses == sorted(losses)
    assert losses[-1] == 4999
    assert ledger.thin(rows[:150]) == rows[:150]


def test_paths_of_this_machine_are_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    options = f"--workdir={tmp_path}/runs/a --model /usr/share --cache={tmp_path.parent}/cache"
    value = {
        "command": f"/usr/bin/python3 -m x {options}",
        "list": [f"{tmp_path}/data.csv"],
        f"{tmp_path}/key": "value",
        "kept": [
            "hf://org/name",
            "pypi://a==1/b!/c",
            "test/accuracy",
            ".*/bias$",
            "(^|/)bias",
            "/nowhere/file",
            "a / b",
        ],
        "number": 1.5,
    }
    cleaned = ledger.without_paths(value)
    assert cleaned["command"] == "python3 -m x --workdir=runs/a --model share --cache=~/cache"
    assert cleaned["list"] == ["data.csv"]
    assert cleaned["key"] == "value"
    assert cleaned["kept"] == value["kept"]
    assert cleaned["number"] == 1.5


def test_committed_pages_are_what_the_records_say(tmp_path):
    root = shutil.copytree(PROJECT / "experiments", tmp_path / "experiments")
    shutil.copy(PROJECT / "README.md", tmp_path / "README.md")
    names = ledger.write(root)
    pages = ["README.md", "experiments/README.md", *(f"experiments/{name}/README.md" for name in names)]
    stale = [page for page in pages if (tmp_path / page).read_text() != (PROJECT / page).read_text()]
    assert not stale, "run `python -m research.report --ledger` and commit what it writes"
    linked = [name for name in names if "results.png" in (PROJECT / f"experiments/{name}/README.md").read_text()]
    assert all((PROJECT / f"experiments/{name}/results.png").exists() for name in linked)


def test_committed_records_hold_no_paths_of_a_machine():
    for path in PROJECT.glob("experiments/*/runs/**/*.json"):
        value = json.loads(path.read_text())
        assert ledger.without_paths(value) == value, path
