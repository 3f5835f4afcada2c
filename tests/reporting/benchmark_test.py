import json
import sys

import pytest

from research.errors import UserError
from research.reporting import benchmark


def test_the_last_line_is_what_a_program_says_and_it_runs_on_the_cores_it_is_given(tmp_path):
    script = tmp_path / "side.py"
    script.write_text("import json, os\nprint('compiling')\nprint(json.dumps({'cores': len(os.sched_getaffinity(0))}))")
    assert benchmark.run([sys.executable, script], threads=1)["cores"] == 1


def test_a_program_that_fails_is_quoted(tmp_path):
    script = tmp_path / "side.py"
    script.write_text("raise SystemExit('no torch here')")
    with pytest.raises(UserError, match=r"side.py ended with status 1: no torch here"):
        benchmark.run([sys.executable, script], threads=1)


def test_a_record_has_the_files_of_a_run(tmp_path):
    said = {"packages": {"jax": "1"}, "start": "2026-01-01T00:00:00+00:00"}
    benchmark.record(tmp_path / "a" / "round-0", {"batch_size": 4}, said, {"tokens_per_second": 2.5}, [{"step": 1}])
    read = {p.name: p.read_text() for p in (tmp_path / "a" / "round-0").iterdir()}
    assert read.keys() == {"config.json", "run.json", "metrics.jsonl", "result.json"}
    assert json.loads(read["result.json"]) == {"step": 1, "metrics": {}, "tokens_per_second": 2.5}
    assert json.loads(read["run.json"])["packages"] == {"jax": "1"}


def test_sides_are_measured_in_turns(capsys):
    speeds = {"ours": iter([30.0, 20.0, 60.0]), "theirs": iter([10.0, 20.0, 30.0])}
    asked = []

    def measure(side, number):
        asked.append((side, number))
        return next(speeds[side])

    benchmark.alternate(measure, ("ours", "theirs"), 3, "images")
    assert asked == [(side, number) for number in range(3) for side in ("ours", "theirs")]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "round 0  ours 30 images/s  theirs 10 images/s  ratio 3.00"
    assert said[-1] == "median ratio: 2.00  (1.00 to 3.00)"


def test_a_mistake_is_a_line_and_status_2(capsys):
    def main():
        raise UserError("no torch here")

    with pytest.raises(SystemExit, match="2"):
        benchmark.exit_with(main)
    assert capsys.readouterr().err == "error: no torch here\n"
