"""Times training steps here and in PyTorch, in turns, and compares the tokens per second.

    python experiments/gpt_speed/benchmark.py --workload gpt --peer-python PEERS/bin/python --output runs/step_speed

Run it from the project's root, with this project's Python, on a machine that does nothing else; PEERS is an environment
with torch and transformers. Both sides are bound to the same cores, told to use as many threads, train the same sizes
on batches of the same shape (workloads.py), in float32 with AdamW and clipping, and read the loss of every step. A
side's speed is the tokens of a batch over the median seconds of a step, compilation left out.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys

from workloads import WORKLOADS

from research.errors import UserError
from research.record import git_revision, write_json

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {"ours": "ours.py", "pytorch": "peer.py"}


def run(side: str, arguments: argparse.Namespace, round_number: int) -> float:
    """Runs one side once, records it, and returns its tokens per second."""
    work = WORKLOADS[arguments.workload]
    python = sys.executable if side == "ours" else str(arguments.peer_python)
    threads = str(arguments.threads)
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    start = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    process = subprocess.run(
        [python, str(HERE / SIDES[side]), arguments.workload, str(arguments.steps)],
        env=os.environ
        | {"OMP_NUM_THREADS": threads, "NPROC": threads, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        | {"PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if process.returncode:
        raise UserError(f"{side} ended with status {process.returncode}: {process.stderr.strip()[-2000:]}")
    said = json.loads(process.stdout.strip().splitlines()[-1])
    tokens = work.batch_size * work.length
    speed = tokens / statistics.median(said["seconds"])
    folder = arguments.output / arguments.workload / side / f"round-{round_number}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"workload": arguments.workload, **vars(work), "threads": arguments.threads})
    write_json(
        folder / "run.json",
        {
            "command": shlex.join(sys.orig_argv),
            "git": git_revision(),
            "python": platform.python_version(),
            "packages": said["packages"],
            "devices": {"kind": "cpu", "count": 1, "hosts": 1},
            "seed": 0,
            "start": start,
            "ended": "finished",
        },
    )
    rows = [{"step": i, "train/step_seconds": seconds} for i, seconds in enumerate(said["seconds"], start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"step": arguments.steps, "metrics": {}, "tokens_per_second": speed}
    write_json(folder / "result.json", result | {k: said[k] for k in ("compile_seconds", "parameters", "loss")})
    return speed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, required=True, help="what is trained: see workloads.py")
    parser.add_argument("--peer-python", type=pathlib.Path, required=True, help="an interpreter with transformers")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/step_speed"), help="the records")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed in a run (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each side (default: 2)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.steps, arguments.threads) < 1:
        parser.error("--rounds, --steps and --threads are at least 1")
    ratios = []
    for number in range(arguments.rounds):
        speeds = {side: run(side, arguments, number) for side in SIDES}
        ratios.append(speeds["ours"] / speeds["pytorch"])
        shown = "  ".join(f"{side} {speed:,.0f} tokens/s" for side, speed in speeds.items())
        print(f"round {number}  {shown}  ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
