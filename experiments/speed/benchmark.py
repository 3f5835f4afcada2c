"""Trains the movie snippets here and in Transformers' Trainer, in turns, and compares their speeds.

    python experiments/speed/benchmark.py --peer-python PEERS/bin/python --output runs/speed

Run it from the project's root, with this project's Python, on a machine that does nothing else; PEERS is an environment
with torch, transformers and accelerate. Both sides are bound to the same cores and told to use as many threads.

The speed that is compared is observed from outside and in the same way for both: the examples between the first and the
last line of training metrics (steps 50 and `--steps`), over the seconds between their arrival. By then both are warm;
what is compiled later counts, and so does waiting for data. What each side says of itself is recorded beside it.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

from research import assets
from research.configuration.variants import MINILM
from research.data.datasets import movie_snippets
from research.errors import UserError
from research.reporting import benchmark

ROOT = pathlib.Path(__file__).resolve().parents[2]

SIDES = ("ours", "trainer")
BATCH_SIZE, TRAIN_EXAMPLES = 32, 9509
LOG_EVERY = 50  # steps; of both sides
RECORDS = ("config.json", "run.json", "metrics.jsonl")


def command(side: str, arguments: argparse.Namespace, folder: pathlib.Path) -> list[str]:
    """What is run: the same recipe, batches and number of steps on both sides."""
    if side == "ours":
        # Half a step more than wanted, as a number of epochs is rounded down to whole steps.
        epochs = (arguments.steps + 0.5) * BATCH_SIZE / TRAIN_EXAMPLES
        options = [f"--workdir={folder}", f"--config.num_epochs={epochs}", f"--config.log.every_steps={LOG_EVERY}"]
        return [sys.executable, "-m", "research.main", "--config=configs/movie_snippets.py", *options]
    script = str(ROOT / "experiments" / "movie_snippets" / "peer_trainer.py")
    source = [f"--model={assets.resolve(MINILM)}", f"--data={assets.resolve(movie_snippets.SOURCE)}"]
    options = [f"--output={folder}", f"--max-steps={arguments.steps}", f"--threads={arguments.threads}", "--no-eval"]
    return [str(arguments.peer_python), script, *source, *options]


def run(side: str, arguments: argparse.Namespace, round_number: int) -> dict:
    """Run one side once and return the numbers to record; `record` holds where they are."""
    name = f"round-{round_number}"
    folder, record = arguments.output / "work" / side / name, arguments.output / "records" / side / name
    for path in (folder, record):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "NPROC": str(arguments.threads),  # the threads of XLA on a CPU
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # empty: every round compiles anew
    }
    start = time.monotonic()
    with (record.parent / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command(side, arguments, folder),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        arrivals = watch(process, folder / "metrics.jsonl")
    if process.returncode:
        raise UserError(f"{side} ended with status {process.returncode}; its output is in {log.name}")
    numbers = measure(arrivals, json.loads((folder / "result.json").read_text()))
    numbers["wall_seconds"] = time.monotonic() - start
    for file in RECORDS:
        shutil.copy(folder / file, record / file)
    (record / "result.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


def watch(process: subprocess.Popen, metrics: pathlib.Path) -> dict[int, float]:
    """Wait for a process; return {step: when its line of training metrics came, in seconds}."""
    arrivals: dict[int, float] = {}
    while process.poll() is None:
        time.sleep(0.05)
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # the last one may be half written
        for line in lines[len(arrivals) :]:
            row = json.loads(line)
            if "train/loss" in row:
                arrivals.setdefault(row["step"], time.monotonic())
    return arrivals


def measure(arrivals: dict[int, float], result: dict) -> dict:
    """Add to a result.json the speed observed from outside, and the one with all compilation counted."""
    first, last = min(arrivals), max(arrivals)
    if first == last:
        raise UserError(f"--steps: at least {2 * LOG_EVERY}, for two lines of training metrics")
    observed = (last - first) * BATCH_SIZE / (arrivals[last] - arrivals[first])
    total = result["train_seconds"] + result.get("compile_seconds", 0.0)
    with_compilation = result["step"] * BATCH_SIZE / total
    return {
        **result,
        "observed_examples_per_second": observed,
        "examples_per_second_with_compilation": with_compilation,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=pathlib.Path, required=True, help="an interpreter with transformers")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/speed"), help="where to work")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (default: 3)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run (default: 150)")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each side (default: 2)")
    arguments = parser.parse_args()
    arguments.output = arguments.output.absolute()
    if arguments.steps % LOG_EVERY or arguments.steps < 2 * LOG_EVERY:
        parser.error(f"--steps: a multiple of {LOG_EVERY}, at least {2 * LOG_EVERY}, not {arguments.steps}")
    if arguments.rounds < 1:
        parser.error(f"--rounds: at least 1, not {arguments.rounds}")
    if not os.access(arguments.peer_python, os.X_OK):
        parser.error(f"--peer-python: {arguments.peer_python} is no interpreter")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    metrics = ("observed_examples_per_second", "examples_per_second", "examples_per_second_with_compilation")
    rounds: list[dict[str, dict]] = []
    for number in range(arguments.rounds):
        rounds.append({})
        for side in SIDES:
            numbers = rounds[-1][side] = run(side, arguments, number)
            shown = "  ".join(f"{metric} {numbers[metric]:.1f}" for metric in metrics)
            print(f"round {number}  {side:8}{shown}  wall_seconds {numbers['wall_seconds']:.0f}", flush=True)
    for metric in metrics:
        ratios = [pair["ours"][metric] / pair["trainer"][metric] for pair in rounds]
        print(f"median ratio of {metric}: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    for side in SIDES:
        records = " ".join(str(arguments.output / "records" / side / f"round-{i}") for i in range(arguments.rounds))
        print(f"to record: python -m research.report --record {records} --into experiments/speed/{side}")


if __name__ == "__main__":
    benchmark.exit_with(main)
