"""Times greedy decoding of SmolLM2-135M here and in Transformers, in turns, on the same weights.

    python experiments/decode_speed/benchmark.py --peer-python PEERS/bin/python --output runs/decode_speed

Run it from the project's root, with this project's Python, on a machine that does nothing else; PEERS is an environment
with torch and transformers. Both sides read the same exported folder, in float32, and are bound to the same cores and
told to use as many threads. A side's speed is the new tokens over the median seconds of a whole generation, the prompt
included and compilation left out. This project is timed without a cache too, to show what the cache is worth.
"""

import argparse
import pathlib
import statistics
import sys

import jax
import numpy as np

from research import assets
from research.configuration.variants import SMOLLM2
from research.pretrained import huggingface
from research.reporting import benchmark

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {"ours": "ours.py", "transformers": "peer.py"}


def export(folder: pathlib.Path) -> None:
    """Write the weights as a folder that both sides read."""
    model = huggingface.load_model(SMOLLM2, "causal_lm")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 4), np.int32)))["params"]
    huggingface.save(folder, model, huggingface.load_params(SMOLLM2, model, shapes)[0])


def run(side: str, arguments: argparse.Namespace, folder: pathlib.Path, round_number: int) -> dict:
    """Run one side once, record it, and return its tokens and its tokens per second."""
    python = sys.executable if side == "ours" else arguments.peer_python
    sizes = [arguments.batch_size, arguments.prompt_tokens, arguments.new_tokens, arguments.repeats]
    said = benchmark.run([python, HERE / SIDES[side], folder, *sizes], arguments.threads)
    count = arguments.batch_size * arguments.new_tokens
    speeds = {name: count / statistics.median(seconds) for name, seconds in said["seconds"].items()}
    result = {"tokens_per_second": speeds["cached"]}
    if "anew" in speeds:
        result["tokens_per_second_without_cache"] = speeds["anew"]
    names = ("batch_size", "prompt_tokens", "new_tokens", "threads")
    config = {"model": SMOLLM2, **{name: getattr(arguments, name) for name in names}}
    record = arguments.output / f"batch-{arguments.batch_size}" / side / f"round-{round_number}"
    benchmark.record(record, config, said, result)
    return said | {"speeds": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=pathlib.Path, required=True, help="an interpreter with transformers")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/decode_speed"), help="the records")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, help="generations timed in a round (default: 3)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at once (default: 1)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of a prompt (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each side (default: 2)")
    arguments = parser.parse_args()
    folder = arguments.output.absolute() / "smollm2"
    if not folder.exists():
        assets.resolve(SMOLLM2)
        export(folder)
    ratios = []
    for number in range(arguments.rounds):
        said = {side: run(side, arguments, folder, number) for side in SIDES}
        speeds = {side: each["speeds"] for side, each in said.items()}
        ratios.append(speeds["ours"]["cached"] / speeds["transformers"]["cached"])
        same = np.mean(np.array(said["ours"]["tokens"]) == np.array(said["transformers"]["tokens"]))
        print(
            f"round {number}  ours {speeds['ours']['cached']:.1f} tokens/s, without a cache "
            f"{speeds['ours']['anew']:.1f}  transformers {speeds['transformers']['cached']:.1f}  "
            f"ratio {ratios[-1]:.2f}  equal with and without a cache: {said['ours']['same_tokens']}, "
            f"and in both programs: {100 * same:.0f} %",
            flush=True,
        )
    print(benchmark.summary(ratios))


if __name__ == "__main__":
    benchmark.exit_with(main)
