"""Runs the points of a config's `get_sweep()`, each in a process of its own, so that none can stop the others.

sweep folder/
  POINT/            a run, as `train` writes it
  logs/POINT.txt    what its process printed
  sweep.json        the points: their overrides, how far they are, their metrics (sweep-3-of-16.json of a shard)
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from ml_collections import ConfigDict

from research import storage
from research.configuration import overrides, sweeps
from research.errors import UserError, nearest
from research.reporting import runs
from research.reporting.record import read_json, write_json
from research.reporting.writers import METRICS, duration, read_metrics
from research.runtime.preemption import PreemptedError

LOWER = ("loss", "perplexity", "error", "bits_per_byte", "seconds")  # metrics of which less is better
DONE, STOPPED, FAILED = "finished", "stopped early", "failed"


class PointsFailedError(Exception):
    """Some points failed; the others are done."""


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    file: str,
    changes: Sequence[overrides.Override] = (),
    parallel: str | int = 1,
    shard: str = "1/1",
    metric: str | None = None,
    halving: str | float | None = None,
) -> dict[str, Any]:
    """Run what is left of a sweep, and print its table.

    Args:
      config: that of `file`, with `changes`.
      workdir: the sweep's folder.
      file: the config file, with its variant, as --config has it.
      changes: overrides of every point; a point's own values count before them.
      parallel: points that run at once; each gets its part of the cores, and of the GPUs in CUDA_VISIBLE_DEVICES.
      shard: "3/16" runs every sixteenth point from the third on, for jobs that share a folder.
      metric: by which points are ranked, "test/accuracy" or "test/loss:min"; that of config.checkpoint.best where it is
        None.
      halving: successive halving (Jamieson 2016): at growing shares of the run only the best 1 / `halving` of the
        points go on, the last of them to the end.

    Returns:
      {name of a point: what sweep.json says of it}.

    Raises:
      UserError: the config defines no sweep, a point does not fit it, or an argument is wrong.
      PreemptedError: SIGTERM came; the points that were running are saved.
      PointsFailedError: a point failed, after all others are done.
    """
    if storage.is_remote(workdir):
        raise UserError("--workdir: a sweep's folder is a local one, or one that all machines mount")
    points = _points(file, changes)
    index, count = _fraction(shard)
    if halving is not None and count > 1:
        raise UserError("--halving: it ranks all points, and cannot be combined with --shard")
    own = dict(list(points.items())[index - 1 :: count])
    ranking, rungs = _ranking(config, metric, needed=halving is not None), _rungs(len(own), halving)
    name = "sweep.json" if count == 1 else f"sweep-{index}-of-{count}.json"
    with _Runner(workdir, file, changes, own, _positive("--parallel", parallel), ranking, workdir / name) as runner:
        for share, keep in rungs:
            runner.advance(share)
            runner.keep_best(keep)
    runner.table()
    if failed := [name for name, entry in runner.entries.items() if entry["status"] == FAILED]:
        logs = f"; what they printed is in {workdir / 'logs'}, and the same command tries them again"
        raise PointsFailedError(f"{len(failed)} of {len(own)} points failed: {', '.join(failed)}{logs}")
    return runner.entries


def _points(file: str, changes: Sequence[overrides.Override]) -> dict[str, sweeps.Point]:
    """Return the points by their names, once each has been tried on the config."""
    sweep = overrides.load_sweep(file)
    for point in sweep:
        overrides.apply(overrides.load(file), _merged(changes, point))
    return dict(zip(sweeps.names(sweep), sweep))


def _merged(changes: Sequence[overrides.Override], point: sweeps.Point) -> list[overrides.Override]:
    own = [(key, sweeps.as_text(value)) for key, value in point.items()]
    return [(key, text) for key, text in changes if key not in point] + own


def _fraction(shard: str) -> tuple[int, int]:
    index, slash, count = shard.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard: '{shard}' is not like 3/16, the third of sixteen")
    return int(index), int(count)


def _positive(flag: str, value: str | int) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise UserError(f"{flag}: {value} is not a positive integer")
    return int(value)


def _rungs(count: int, halving: str | float | None) -> list[tuple[float, int]]:
    """Return the shares of a run at which to rank points, and how many go on from each; the last share is 1."""
    rungs = []
    if halving is not None:
        try:
            factor = float(halving)
        except ValueError:
            factor = 0.0
        if factor <= 1:
            raise UserError(f"--halving: {halving} is not a number above 1, such as 3")
        for left in range(int(math.log(count, factor) + 1e-9), 0, -1):
            count = math.ceil(count / factor)
            rungs.append((factor**-left, count))
    return [*rungs, (1.0, count)]


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """A metric and which direction of it is better."""

    metric: str
    sign: int

    def key(self, entry: Mapping[str, Any]) -> tuple[bool, float]:
        """Return what sorts the best first, and what has no such number last."""
        value = entry["metrics"].get(self.metric)
        known = value is not None and math.isfinite(value)
        return not known, self.sign * value if known else 0.0


def _ranking(config: ConfigDict, metric: str | None, needed: bool) -> _Ranking | None:
    section = config.get("checkpoint") or {}
    if metric is None and section.get("best"):
        return _Ranking(section["best"], 1 if section.get("mode") == "min" else -1)
    if metric is None:
        if needed:
            raise UserError("--metric: say by which metric points are ranked, such as --metric=test/accuracy")
        return None
    name, colon, direction = metric.partition(":")
    if colon and direction not in ("min", "max"):
        raise UserError(f"--metric: '{direction}' is neither min nor max{nearest(direction, ('min', 'max'))}")
    lower = direction == "min" if colon else name.endswith(LOWER)
    return _Ranking(name, 1 if lower else -1)


class _Runner:
    """The points of this process' share, and the processes that run them."""

    def __init__(
        self,
        workdir: pathlib.Path,
        file: str,
        changes: Sequence[overrides.Override],
        points: Mapping[str, sweeps.Point],
        parallel: int,
        ranking: _Ranking | None,
        record: pathlib.Path,
    ):
        self._workdir, self._file, self._changes, self._parallel = workdir, file, changes, parallel
        self._ranking, self._record, self._points = ranking, record, points
        self._console = rich.console.Console(stderr=True, soft_wrap=True)
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._running: dict[str, subprocess.Popen] = {}
        self._places = [_part(i, parallel) for i in range(parallel)]
        self.entries = {name: {"overrides": dict(point), **self._state(name)} for name, point in points.items()}

    def __enter__(self) -> "_Runner":
        (self._workdir / "logs").mkdir(parents=True, exist_ok=True)
        self._previous = signal.signal(signal.SIGTERM, lambda *_: self._stop())
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def advance(self, share: float) -> None:
        """Run all points that go on up to a share of their steps."""
        waiting = [name for name, entry in self.entries.items() if entry["status"] not in (DONE, STOPPED, FAILED)]
        with concurrent.futures.ThreadPoolExecutor(self._parallel) as pool:
            for future in [pool.submit(self._run, name, share) for name in waiting]:
                future.result()
        if self._stopping.is_set():
            raise PreemptedError("the points that were running are saved; run the same command to go on")

    def keep_best(self, count: int) -> None:
        """Let only the best points of those that have not failed go on."""
        left = [name for name, entry in self.entries.items() if entry["status"] not in (FAILED, STOPPED)]
        if self._ranking is None or count >= len(left):
            return
        if not any(self._ranking.metric in self.entries[name]["metrics"] for name in left):
            known = {metric for name in left for metric in self.entries[name]["metrics"]}
            raise UserError(f"--metric: no point gives '{self._ranking.metric}'{nearest(self._ranking.metric, known)}")
        best = sorted(left, key=lambda name: self._ranking.key(self.entries[name]))  # type: ignore[union-attr]
        for name in best[count:]:
            if self.entries[name]["status"] != DONE:
                self.entries[name]["status"] = STOPPED
        self._write()

    def table(self) -> None:
        """Print the points, the best first where they are ranked."""
        entries = list(self.entries.items())
        if self._ranking is not None:
            entries.sort(key=lambda item: self._ranking.key(item[1]))  # type: ignore[union-attr]
        keys = list(dict.fromkeys(key for _, entry in entries for key in entry["overrides"]))
        shown = dict.fromkeys(m for _, e in entries for m in e["metrics"] if not m.startswith("train/"))
        table = rich.table.Table(*keys, *shown, "", title=str(self._workdir), title_justify="left")
        for _, entry in entries:
            cells = [sweeps.as_text(entry["overrides"].get(key, "")) for key in keys]
            cells += [runs.show(m, entry["metrics"][m]) if m in entry["metrics"] else "-" for m in shown]
            table.add_row(*cells, entry["status"])
        self._console.print(table)

    def _run(self, name: str, share: float) -> None:
        """Run one point in a process of its own, up to a share of its steps, and tell how it ended."""
        if self._stopping.is_set():
            return
        with self._lock:
            place = self._places.pop()
        command = [sys.executable, "-m", "research.main", f"--config={self._file}", f"--workdir={self._workdir / name}"]
        command += [f"--config.{key}={text}" for key, text in _merged(self._changes, self._points[name])]
        command += [] if share == 1.0 else [f"--stop_at={share}"]
        begin = time.monotonic()
        with (self._workdir / "logs" / f"{name}.txt").open("a", encoding="utf-8") as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=place.environment)
            # It may be gone, and not every platform has this call.
            with contextlib.suppress(ProcessLookupError, AttributeError):
                os.sched_setaffinity(process.pid, place.cores)
            with self._lock:
                self._running[name] = process
            if self._stopping.is_set():
                process.terminate()
            status = process.wait()
        with self._lock:
            del self._running[name]
            self._places.append(place)
            self.entries[name] |= self._state(name) | self._ending(name, status, share)
            self._write()
            self._tell(name, time.monotonic() - begin)

    def _ending(self, name: str, status: int, share: float) -> dict[str, Any]:
        if status == 0:
            return {"status": DONE}
        if status == 75:  # saved: asked to stop, or at the share that it was to reach
            return {"status": "interrupted" if self._stopping.is_set() else f"at {share:.0%}"}
        lines = (self._workdir / "logs" / f"{name}.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        return {"status": FAILED, "exit_status": status, "error": lines[-1] if lines else ""}

    def _state(self, name: str) -> dict[str, Any]:
        """Return how far a point is, by its folder."""
        result = read_json(self._workdir / name / "result.json")
        if result is not None:
            return {"status": DONE, "metrics": result["metrics"]}
        metrics: dict[str, float] = {}
        for row in read_metrics(self._workdir / name / METRICS):
            metrics |= {key: value for key, value in row.items() if key != "step" and not key.startswith("train/")}
        return {"status": "to do", "metrics": metrics}

    def _tell(self, name: str, seconds: float) -> None:
        entry = self.entries[name]
        ended = sum(entry["status"] not in ("to do", "interrupted") for entry in self.entries.values())
        metrics = "  ".join(f"{metric} {runs.show(metric, value)}" for metric, value in entry["metrics"].items())
        text = f"{entry['status']}: {entry.get('error', '')}" if entry["status"] == FAILED else metrics
        line = f"[{ended}/{len(self.entries)}] {name}: {text}  ({entry['status']}, {duration(seconds)})"
        self._console.print(line, markup=False, highlight=False)

    def _stop(self) -> None:
        self._stopping.set()
        for process in list(self._running.values()):
            process.terminate()

    def _write(self) -> None:
        write_json(self._record, {"config": self._file, "points": self.entries})


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a process may use.

    Attributes:
      environment: its variables.
      cores: the numbers of its cores.
    """

    environment: Mapping[str, str]
    cores: frozenset[int]


def _part(index: int, parallel: int) -> _Place:
    """Return the part of this machine that one of several processes at once gets."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    environment = dict(os.environ)
    devices = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(devices) >= parallel > 1:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[index::parallel])
    own = cores[index::parallel] if len(cores) >= parallel else cores
    return _Place(environment, frozenset(own))
