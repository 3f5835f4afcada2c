"""Times training steps of a small ViT here and in PyTorch, in turns, and compares the images per second.

    python experiments/vit_speed/benchmark.py --peer-python PEERS/bin/python --output runs/vit_speed

Run it from the project's root, with this project's Python, on a machine that does nothing else; PEERS is an environment
with torch and transformers. Both sides are bound to the same cores, told to use as many threads, train the same sizes
on batches of the same shape (workload.py), in float32 with AdamW and clipping, and read the loss of every step. A
side's speed is the images of a batch over the median seconds of a step, compilation left out.
"""

import argparse
import pathlib
import statistics
import sys

from workload import BATCH_SIZE, SIZES

from research import benchmark
from research.errors import UserError

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {"ours": "ours.py", "pytorch": "peer.py"}


def run(side: str, arguments: argparse.Namespace, round_number: int) -> float:
    """Runs one side once, records it, and returns its images per second."""
    python = sys.executable if side == "ours" else arguments.peer_python
    said = benchmark.run([python, HERE / SIDES[side], arguments.steps], arguments.threads)
    speed = BATCH_SIZE / statistics.median(said["seconds"])
    benchmark.record(
        arguments.output / side / f"round-{round_number}",
        {**SIZES, "batch_size": BATCH_SIZE, "threads": arguments.threads},
        said,
        {"images_per_second": speed} | {k: said[k] for k in ("compile_seconds", "parameters", "loss")},
        [{"step": i, "train/step_seconds": seconds} for i, seconds in enumerate(said["seconds"], start=1)],
    )
    return speed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=pathlib.Path, required=True, help="an interpreter with transformers")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/vit_speed"), help="the records")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed in a run (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each side (default: 2)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.steps, arguments.threads) < 1:
        parser.error("--rounds, --steps and --threads are at least 1")
    ratios = []
    for number in range(arguments.rounds):
        speeds = {side: run(side, arguments, number) for side in SIDES}
        ratios.append(speeds["ours"] / speeds["pytorch"])
        shown = "  ".join(f"{side} {speed:,.0f} images/s" for side, speed in speeds.items())
        print(f"round {number}  {shown}  ratio {ratios[-1]:.2f}", flush=True)
    print(benchmark.summary(ratios))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
