"""Times training steps on one GPU here and in compiled PyTorch, in turns, and compares speed and memory.

    python experiments/gpu_speed/benchmark.py --output runs/gpu_speed

Run it from the project's root, on a machine with one GPU that does nothing else, with a Python that has this project's
dependencies; the other side needs torch, transformers, timm and diffusers, in the same environment or in that of
`--peer-python`. Both sides train the same sizes on batches of the same shape (workloads.py). A side's speed is what a
batch holds over the median of three blocks of steps, the loss read at the end of each; compilation is left out.
`--tiny` tries everything on a CPU.
"""

import argparse
import pathlib
import statistics
import sys

from workloads import WORKLOADS, tiny

from research.errors import UserError
from research.reporting import benchmark

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {"ours": "ours.py", "pytorch": "peer.py"}
KEPT = ("compile_seconds", "operations_per_second", "peak_memory_bytes", "loss", "parameters")


def run(arguments: argparse.Namespace, name: str, side: str, number: int) -> dict[str, float] | None:
    """Run one side once, record it, and return its result; None where it failed."""
    work = tiny(WORKLOADS[name]) if arguments.tiny else WORKLOADS[name]
    python = sys.executable if side == "ours" else arguments.peer_python
    command = [python, HERE / SIDES[side], name, f"--steps={arguments.steps}", *(["--tiny"] if arguments.tiny else [])]
    try:
        said = benchmark.run(command, None)
    except UserError as error:
        print(f"{name}  {side}: {str(error)[-600:]}", flush=True)
        return None
    result = {f"{work.unit}_per_second": work.units / statistics.median(said["seconds"])}
    result |= {key: said[key] for key in KEPT}
    benchmark.record(
        arguments.output / name / side / f"round-{number}",
        {"workload": name, **vars(work)},
        said,
        result,
        [{"step": i, "train/step_seconds": seconds} for i, seconds in enumerate(said["seconds"], start=1)],
    )
    speed = result[f"{work.unit}_per_second"]
    print(
        f"{name}  {side} on {said['device']}: {speed:,.0f} {work.unit}/s, "
        f"{said['operations_per_second'] / 1e12:.0f}e12 operations/s, {said['peak_memory_bytes'] / 1e9:.1f} GB, "
        f"compiled in {said['compile_seconds']:.0f} s",
        flush=True,
    )
    return result | {"speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default: all")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="default: both")
    parser.add_argument("--peer-python", type=pathlib.Path, default=sys.executable, help="default: this one")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/gpu_speed"), help="the records")
    parser.add_argument("--rounds", type=int, default=1, help="how often each side runs (default: 1)")
    parser.add_argument("--steps", type=int, default=10, help="steps in a block (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to try the scripts")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.steps) < 1:
        parser.error("--rounds and --steps are at least 1")
    for name in arguments.workloads:
        for number in range(arguments.rounds):
            results = {side: run(arguments, name, side, number) for side in arguments.sides}
            ours, theirs = (results.get(side) for side in SIDES)
            if ours and theirs:
                memory = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"] if theirs["peak_memory_bytes"] else 0.0
                print(
                    f"{name}  speed ratio {ours['speed'] / theirs['speed']:.2f}, memory ratio {memory:.2f}", flush=True
                )


if __name__ == "__main__":
    benchmark.exit_with(main)
