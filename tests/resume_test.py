"""Whatever stops a run, the same command ends with the same bits as a run that was never stopped.

Runs are killed from outside, by watching what they print and the files that appear; the product has no hooks for it.
RESEARCH_KILL_POINTS=40 tries that many random kills and prints where each run was killed and what it resumed from.
"""

import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[1]
STEPS, SAVED_LAST = 60, "checkpoints/60"
CONFIG = """
from configs import movie_snippets

def get_config(variant=""):
    config = movie_snippets.get_config("tiny")
    config.num_epochs = 30.0  # 60 steps
    config.optimizer.learning_rate = 1e-3
    config.task.model.encoder.update(num_layers=1, intermediate_size=32)
    config.data.length_buckets = config.evals.test.data.length_buckets = 1
    config.log = dict(every_steps=5, evaluate_every_steps=12)
    config.checkpoint = dict(every_steps=7, keep=2, best="test/loss", mode="min")
    return config
"""


class Run:
    """One attempt at a run, by the public command, in a process of its own."""

    def __init__(self, workdir: pathlib.Path, cache: pathlib.Path, *overrides: str, file_blocks: int = 0, **env: str):
        command = [sys.executable, "-m", "research.main", f"--workdir={workdir}"]
        command += [f"--config={cache.parent / 'config.py'}"]
        command += [o if o.startswith("--") else f"--config.{o}" for o in overrides]
        if file_blocks:
            command = ["sh", "-c", f'ulimit -f {file_blocks}; exec "$@"', "sh", *command]
        self.workdir, self.lines = workdir, []
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"} | env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stderr:
            self.lines.append(line.rstrip())

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in list(self.lines))

    def signal_when(self, number: int, point: Callable[["Run"], bool], delay: float = 0.0) -> bool:
        """Sends a signal as soon as `point` holds and a delay has passed; returns whether the run still went on."""
        while self._process.poll() is None and not point(self):
            time.sleep(0.001)
        time.sleep(delay)
        alive = self._process.poll() is None
        if alive:
            self._process.send_signal(number)
        self.wait()
        return alive

    def wait(self) -> int:
        try:
            status = self._process.wait(timeout=300)
        finally:
            self._process.kill()
        self._reader.join()
        return status

    def done(self) -> "Run":
        assert self.wait() == 0, "\n".join(self.lines)
        return self

    @property
    def resumed_from(self) -> str:
        return next((line.split()[-1] for line in self.lines if line.startswith("resumed from step")), "-")


def says(pattern: str) -> Callable[[Run], bool]:
    return lambda run: run.said(pattern)


def exists(pattern: str) -> Callable[[Run], bool]:
    return lambda run: any(run.workdir.glob(pattern))


KILL_POINTS = {
    "before anything": lambda run: True,
    "compiling": says(r"^compiling .* \.\.\.$"),
    "between log lines": says(r"^step 10/"),
    "evaluating": says(r"^evaluating at step 12 \.\.\.$"),
    "in a save": exists("checkpoints/*.orbax-checkpoint-tmp"),
    "after a save": exists("checkpoints/28"),
    "finishing": exists(SAVED_LAST),
    "drawing": exists("figures"),
}


def arrays(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint, the optimizer's state included."""
    tree = ocp.StandardCheckpointer().restore(checkpoint / "state")
    return {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree.leaves_with_path(tree)}


def untimed(record: dict) -> dict:
    """Drops what may differ between two runs of one command."""
    return {
        k: v
        for k, v in record.items()
        if not k.endswith(("_per_second", "_seconds", "waiting_share")) and k != "peak_memory_bytes"
    }


def history(workdir: pathlib.Path) -> list[dict]:
    return [untimed(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def result(workdir: pathlib.Path) -> dict:
    return untimed(json.loads((workdir / "result.json").read_text()))


def assert_identical(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    assert history(workdir) == history(reference)
    assert result(workdir) == result(reference)
    found, wanted = arrays(workdir / SAVED_LAST), arrays(reference / SAVED_LAST)
    assert found.keys() == wanted.keys()
    assert len(found) > 60
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        assert found[name].tobytes() == wanted[name].tobytes(), name
    assert not [*workdir.rglob("*tmp*")], "leftovers"


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """A folder that all processes of one pytest run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache(shared) -> pathlib.Path:
    """The compilation cache of all runs."""
    (shared / "config.py").write_text(CONFIG)
    return shared / "compiled"


@pytest.fixture(scope="session")
def reference(shared, cache) -> pathlib.Path:
    """A run that was never stopped."""
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first test process runs it, the others wait
        if not (shared / "reference" / "result.json").exists():
            Run(shared / "reference", cache).done()
    return shared / "reference"


@pytest.mark.parametrize(
    "points",
    [
        ("before anything", "compiling", "between log lines", "after a save", "finishing"),
        ("evaluating", "in a save", "drawing"),
    ],
    ids=" - ".join,
)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(points, reference, cache, tmp_path):
    workdir = tmp_path / "run"
    for name in points:
        delay = 0.3 if name == "before anything" else 0.0
        alive = Run(workdir, cache).signal_when(signal.SIGKILL, KILL_POINTS[name], delay)
        assert alive, f"'{name}' came too late to kill anything"
    Run(workdir, cache).done()
    assert_identical(workdir, reference)
    attempts = json.loads((workdir / "run.json").read_text())["attempts"]
    assert {a["ended"] for a in attempts[:-1]} == {"killed"}
    assert attempts[-1]["ended"] == "finished"


@pytest.mark.parametrize("seed", range(int(os.environ.get("RESEARCH_KILL_POINTS", "0"))))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(seed, reference, cache, tmp_path):
    draw, workdir, told = random.Random(seed), tmp_path / "run", []
    for _ in range(draw.choice([1, 1, 1, 2])):
        line = draw.randrange(0, 30)
        delay = draw.random() * (0.3 if line else 5.0)  # seconds; nothing is said before the first compilation
        run = Run(workdir, cache)
        alive = run.signal_when(signal.SIGKILL, lambda r, n=line: len(r.lines) >= n, delay)
        told.append(f"{run.lines[-1] if run.lines else 'starting'} | {'killed' if alive else 'was over'}")
    last = Run(workdir, cache).done()
    assert_identical(workdir, reference)
    print(f"\nkill {seed} | {' | '.join(told)} | resumed from {last.resumed_from} | identical")


def stop(workdir: pathlib.Path, cache: pathlib.Path, name: str, *overrides: str) -> Run:
    """Sends SIGTERM at a point and checks that the run saved its state."""
    run = Run(workdir, cache, *overrides)
    assert run.signal_when(signal.SIGTERM, KILL_POINTS[name])
    assert run.wait() == 75, "\n".join(run.lines)
    stopped = re.fullmatch(r"preempted: stopped at step (\d+); run the same command to go on", run.lines[-1])
    assert stopped
    assert (workdir / "checkpoints" / stopped[1]).is_dir()
    assert json.loads((workdir / "run.json").read_text())["ended"] == "preempted"
    return run


def test_sigterm_while_compiling_and_training_saves_and_exits_75(reference, cache, tmp_path):
    workdir = tmp_path / "run"
    first = stop(workdir, cache, "compiling")
    second = stop(workdir, cache, "between log lines")
    last = Run(workdir, cache).done()
    assert [first.resumed_from, second.resumed_from] == ["-", "1"]
    assert int(last.resumed_from) >= 10
    assert_identical(workdir, reference)


def test_an_evaluation_interrupted_by_sigterm_is_done_again_and_its_metric_kept(reference, cache, tmp_path):
    workdir = tmp_path / "run"
    run = stop(workdir, cache, "evaluating")
    assert not run.said("^evaluating at step 12:")
    run = Run(workdir, cache)  # killed about when the checkpoint is told of the evaluation's result
    assert run.signal_when(signal.SIGKILL, says(r"^step 12  test/loss"))
    assert run.resumed_from == "12"
    assert run.said("^evaluating at step 12:")
    last = Run(workdir, cache).done()
    assert last.resumed_from == "12"
    assert_identical(workdir, reference)


def test_a_damaged_checkpoint_falls_back_and_says_so_in_one_line(reference, cache, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "result.json").unlink()
    (workdir / SAVED_LAST / "state" / "manifest.ocdbt").unlink()
    run = Run(workdir, cache).done()
    assert re.match(r"checkpoint 60 is unreadable \(.*\); trying the one before$", run.lines[0])
    assert re.match("resumed from step 5[0-9]$", run.lines[1])
    assert not run.said("Traceback|Exception ignored")
    assert (workdir / "checkpoints" / "unreadable-60-0").is_dir()
    assert_identical(workdir, reference)


def test_no_readable_checkpoint_is_an_error_and_never_a_restart(reference, cache, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "result.json").unlink()
    for path in workdir.glob("checkpoints/*/state/d/*"):
        os.truncate(path, 10)
    before = sorted(map(str, workdir.rglob("*")))
    run = Run(workdir, cache)
    assert run.wait() == 1
    steps = sorted(int(p.name) for p in (reference / "checkpoints").iterdir())
    assert run.lines[-1] == f"error: none of the checkpoints {steps} in {workdir}/checkpoints can be read"
    assert len(run.lines) == 1 + len(steps)
    assert sorted(map(str, workdir.rglob("*"))) == before


def test_a_loss_that_is_not_finite_is_one_line_and_status_1(cache, tmp_path):
    run = Run(tmp_path, cache, "optimizer.learning_rate=1e30", "checkpoint.every_steps=1")
    assert run.wait() == 1
    said = re.fullmatch(r"error: the .* is nan at step (\d+); the last good checkpoint is kept", run.lines[-1])
    assert said
    assert not run.said("Traceback")
    assert (tmp_path / "checkpoints" / str(int(said[1]) - 1)).is_dir()


def test_another_learning_rate_is_the_users_mistake_and_status_2(reference, cache, tmp_path):
    workdir = pathlib.Path(shutil.copytree(reference, tmp_path / "run"))
    (workdir / "result.json").unlink()
    run = Run(workdir, cache, "optimizer.learning_rate=0.5")
    assert run.wait() == 2
    assert run.lines == [
        f"error: config.optimizer.learning_rate: {workdir} holds a run with 0.001, this one has 0.5; "
        "use another --workdir"
    ]


def test_a_full_disk_stops_the_run_and_loses_nothing(reference, cache, tmp_path):
    workdir = tmp_path / "run"
    first = Run(workdir, cache)
    first.signal_when(signal.SIGTERM, exists("checkpoints/7"))
    full = Run(workdir, cache, file_blocks=60)  # less than a checkpoint's largest file
    assert full.wait() == 1
    assert re.match("error: a checkpoint could not be saved .*File too large.*those before it are kept", full.lines[-1])
    assert not full.said("Traceback")
    for name in ("config.json", "run.json"):
        json.loads((workdir / name).read_text())
    assert not (workdir / "result.json").exists()
    assert int(Run(workdir, cache).done().resumed_from) >= 7
    assert_identical(workdir, reference)


FOUR = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}


@pytest.mark.parametrize(
    ("first", "second"),
    [(("mesh.fsdp=2", "mesh.model=2"), ()), ((), ("mesh.data=2", "mesh.fsdp=2"))],
    ids=["from four devices to one", "from one device to four"],
)
def test_going_on_with_other_devices_computes_the_same(first, second, reference, cache, tmp_path):
    workdir = tmp_path / "run"
    run = Run(workdir, cache, *first, **(FOUR if first else {}))
    run.signal_when(signal.SIGTERM, exists("checkpoints/28"))
    assert run.wait() == 75
    run = Run(workdir, cache, *second, **(FOUR if second else {})).done()
    assert int(run.resumed_from) >= 28
    assert_close(history(workdir), history(reference))
    assert json.loads((workdir / "run.json").read_text())["devices"]["count"] == (4 if second else 1)


def assert_close(found: list[dict], wanted: list[dict]) -> None:
    assert [list(row) for row in found] == [list(row) for row in wanted]
    for row, expected in zip(found, wanted):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=2e-4, atol=1e-6)


def pair(workdir: pathlib.Path, cache: pathlib.Path) -> list[Run]:
    """Starts two processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    return [Run(workdir, cache, "--distributed", JAX_PROCESS_ID=str(i), **env) for i in range(2)]


def test_two_processes_train_together_and_one_writes(cache, tmp_path):
    workdir = tmp_path / "run"
    runs = pair(workdir, cache)
    assert runs[0].signal_when(signal.SIGTERM, KILL_POINTS["between log lines"])  # one of them; both stop
    assert [run.wait() for run in runs] == [75, 75], "\n".join([*runs[0].lines, "--", *runs[1].lines])
    runs = pair(workdir, cache)
    assert [run.wait() for run in runs] == [0, 0], "\n".join([*runs[0].lines, "--", *runs[1].lines])
    assert int(runs[0].resumed_from) >= 10
    assert result(workdir)["step"] == STEPS
    assert [row["step"] for row in history(workdir) if "test/loss" in row] == [12, 24, 36, 48, 60]
    assert runs[0].said("^step 60/60")
    assert not runs[1].said("^step")
    assert json.loads((workdir / "run.json").read_text())["devices"]["hosts"] == 2


@pytest.mark.slow
def test_a_run_goes_on_with_two_processes_and_with_one_again(reference, cache, tmp_path):
    workdir = tmp_path / "run"
    run = Run(workdir, cache)
    assert run.signal_when(signal.SIGTERM, exists("checkpoints/14"))
    assert run.wait() == 75
    runs = pair(workdir, cache)
    assert runs[1].signal_when(signal.SIGTERM, exists("checkpoints/35"))
    assert [run.wait() for run in runs] == [75, 75]
    assert int(runs[0].resumed_from) >= 14
    run = Run(workdir, cache).done()
    assert int(run.resumed_from) >= 35
    found, wanted = ([without_padding(row) for row in history(folder)] for folder in (workdir, reference))
    assert_close(found, wanted)


def without_padding(row: dict) -> dict:
    """Drops the share of padding, which is that of process 0's rows."""
    return {key: value for key, value in row.items() if not key.endswith("padding_share")}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_and_the_run_goes_on_exactly(victim, cache, tmp_path):
    assert [run.wait() for run in pair(tmp_path / "whole", cache)] == [0, 0]
    workdir = tmp_path / "run"
    runs = pair(workdir, cache)
    assert runs[victim].signal_when(signal.SIGKILL, exists("checkpoints/28"))
    other = runs[1 - victim]
    assert other.wait() == 1
    assert [line for line in other.lines if "is lost" in line] == other.lines[-1:], "\n".join(other.lines)
    assert f"process {victim} on " in other.lines[-1]
    assert not other.said("Traceback|stack trace")
    runs = pair(workdir, cache)
    assert [run.wait() for run in runs] == [0, 0], "\n".join([*runs[0].lines, "--", *runs[1].lines])
    assert int(runs[0].resumed_from) >= 14
    assert history(workdir) == history(tmp_path / "whole")
