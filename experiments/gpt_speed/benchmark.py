"""Times training steps here and in PyTorch, in turns, and compares the tokens or images per second.

    python experiments/gpt_speed/benchmark.py --workload gpt --peer-python PEERS/bin/python --output runs/step_speed

Run it from the project's root, with this project's Python, on a machine that does nothing else; PEERS is an environment
with torch and transformers. Both sides are bound to the same cores, told to use as many threads, train the same sizes
on batches of the same shape (workloads.py), in float32 with AdamW and clipping, and read the loss of every step. A
side's speed is what a batch holds over the median seconds of a step, compilation left out.
"""

import argparse
import functools
import pathlib
import statistics
import sys

from workloads import WORKLOADS

from research.reporting import benchmark

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {"ours": "ours.py", "pytorch": "peer.py"}


def run(arguments: argparse.Namespace, side: str, round_number: int) -> float:
    """Run one side once, record it, and return its tokens or images per second."""
    work = WORKLOADS[arguments.workload]
    python = sys.executable if side == "ours" else arguments.peer_python
    said = benchmark.run([python, HERE / SIDES[side], arguments.workload, arguments.steps], arguments.threads)
    speed = work.units / statistics.median(said["seconds"])
    benchmark.record(
        arguments.output / arguments.workload / side / f"round-{round_number}",
        {"workload": arguments.workload, **vars(work), "threads": arguments.threads},
        said,
        {f"{work.unit}_per_second": speed} | {k: said[k] for k in ("compile_seconds", "parameters", "loss")},
        [{"step": i, "train/step_seconds": seconds} for i, seconds in enumerate(said["seconds"], start=1)],
    )
    return speed


def main() -> None:
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
    measure = functools.partial(run, arguments)
    benchmark.alternate(measure, tuple(SIDES), arguments.rounds, WORKLOADS[arguments.workload].unit)


if __name__ == "__main__":
    benchmark.exit_with(main)
