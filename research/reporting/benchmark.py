"""What the benchmark scripts of experiments/ share: programs run in turns on the same cores, and recorded as runs."""

import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from research.errors import UserError
from research.reporting.record import git_revision, write_json
from research.runtime import allocator

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(command: Sequence[object], threads: int | None) -> dict[str, Any]:
    """Run a program and return the JSON object in the last line that it prints, with `start`, in ISO 8601, added.

    Where `threads` is a number it runs on that many of the first cores and no other device; where it is None, on all
    that there is. On CPUs memory is kept between steps, as `allocator.keep` does for this project's runs, whatever the
    program.

    Raises:
      UserError: the program fails; the end of what it said is quoted.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    if threads is not None:
        settings |= {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": allocator.TUNABLES}
        settings |= {"OMP_NUM_THREADS": str(threads), "NPROC": str(threads)}  # of PyTorch, and of XLA on a CPU
    start = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    process = subprocess.run(
        [str(part) for part in command],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if process.returncode:
        raise UserError(f"{command[1]} ended with status {process.returncode}: {process.stderr.strip()[-2000:]}")
    return {"start": start, **json.loads(process.stdout.strip().splitlines()[-1])}


def record(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    said: Mapping[str, Any],
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write a folder that `research.report --record` takes for a run's.

    Args:
      folder: where to write; it is made.
      config: what was measured.
      said: what `run` returned, with the program's "packages" and their versions, and its "device" if not the CPU.
      result: what goes into result.json, beside its "step" and "metrics".
      rows: the lines of metrics.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    facts = {
        "command": shlex.join(sys.orig_argv),
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": said["packages"],
        "devices": {"kind": said.get("device", "cpu"), "count": 1, "hosts": 1},
        "seed": 0,
        "start": said["start"],
        "ended": "finished",
    }
    write_json(folder / "run.json", facts)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "result.json", {"step": len(rows), "metrics": {}, **result})


def alternate(measure: Callable[[str, int], float], sides: Sequence[str], rounds: int, unit: str) -> None:
    """Measure two sides in turns, and prints the speeds of every round and their ratio, and the median of all.

    Args:
      measure: of a side and the number of the round, returns a speed.
      sides: their names; the ratio is that of the first over the second.
      rounds: how many, at least 1.
      unit: what is counted in a second.
    """
    ratios = []
    for number in range(rounds):
        speeds = [measure(side, number) for side in sides]
        ratios.append(speeds[0] / speeds[1])
        shown = "  ".join(f"{side} {speed:,.0f} {unit}/s" for side, speed in zip(sides, speeds))
        print(f"round {number}  {shown}  ratio {ratios[-1]:.2f}", flush=True)
    print(summary(ratios))


def summary(ratios: Sequence[float]) -> str:
    """Return a line on the ratios of all rounds."""
    return f"median ratio: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"


def exit_with(main: Callable[[], None]) -> NoReturn:
    """Run a benchmark script; a mistake of the user's is a line and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
