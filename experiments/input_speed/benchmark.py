"""Times the input: prepared packed text, preparing it, and images, on one core and on two.

    python experiments/input_speed/benchmark.py --megabytes 1000 --output runs/input_speed

Run it from the project's root, on a machine of at least two cores that does nothing else. The text is drawn: documents
of words of a skewed vocabulary, 2,500 characters in the median; its tokenizer is a byte-level BPE of 32,000 that is
trained on the beginning of it. It is prepared by one process on one core and by two on two, and then read in rows of
1,024 packed tokens on one core. The images are JPEG files of about 500 x 375 pixels, decoded, cropped at random to 224
pixels, mirrored and normalised by one process or by two. What is compared runs in turns; medians are printed, and the
lowest and highest value of the rounds.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import statistics
import sys
from typing import Any

import numpy as np

from research.data import source, tokenizer_training
from research.reporting import benchmark

HERE = pathlib.Path(__file__).resolve().parent
VOCABULARY, WORDS, TRAINED_ON = 32_000, 60_000, 4_000  # entries; distinct words; documents


def write_text(folder: pathlib.Path, megabytes: int) -> None:
    """Write the text, where its documents end, and its tokenizer, unless they are there."""
    if (folder / "tokenizer").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    syllables = [
        "".join(pair) for pair in np.stack(np.meshgrid(list("bdfghklmnprstvz"), list("aeiou")), -1).reshape(-1, 2)
    ]
    words = np.array(["".join(rng.choice(syllables, int(rng.integers(1, 5)))) for _ in range(WORDS)])
    shares = np.cumsum(1 / np.arange(3, WORDS + 3))
    ends, first, written = [0], [], 0
    with open(folder / "text.txt", "wb") as file:
        while written < megabytes * 1_000_000:
            count = int(rng.lognormal(6, 0.8)) + 1
            document = (" ".join(words[np.searchsorted(shares, rng.random(count) * shares[-1])]) + "\n\n").encode()
            written += file.write(document)
            ends.append(written)
            if len(first) < TRAINED_ON:
                first.append({"text": document.decode()})
    np.save(folder / "text.npy", np.array(ends))
    own = tokenizer_training.train(source.examples(first), "bpe", VOCABULARY)
    own.save(folder / "tokenizer")


def draw_images(folder: pathlib.Path) -> None:
    """Write the files of the benchmark of the image pipeline."""
    path = HERE.parent / "image_pipeline_speed"
    sys.path.insert(0, str(path))  # its own workload
    spec = importlib.util.spec_from_file_location("image_benchmark", path / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.draw(folder)


def measure(folder: pathlib.Path, kind: str, number: int, cores: int, cache: pathlib.Path) -> dict[str, Any]:
    """Run a workload on some cores."""
    os.environ["RESEARCH_CACHE"] = str(cache)
    return benchmark.run([sys.executable, HERE / "workload.py", kind, folder, number], threads=cores)


def show(name: str, values: list[float], unit: str) -> float:
    """Print a line and return the median."""
    middle = statistics.median(values)
    print(f"{name:52} {middle:14,.2f} {unit}  ({min(values):,.2f} to {max(values):,.2f})", flush=True)
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of text (default: 1000)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/input_speed"), help="where to work")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.megabytes) < 1:
        parser.error("--rounds and --megabytes are at least 1")
    folder = arguments.output.absolute()
    write_text(folder, arguments.megabytes)
    draw_images(folder / "images")
    size = (folder / "text.txt").stat().st_size / 1e6
    caches = {number: folder / f"cache-{number}" for number in (1, 2)}
    speeds: dict[int, list[float]] = {1: [], 2: []}
    worked: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for number, cache in caches.items():
            shutil.rmtree(cache, ignore_errors=True)
            said = measure(folder, "prepare", number, number, cache)
            speeds[number].append(size / said["seconds"])
            worked[number].append(size / said["cpu_seconds"])
    one, two = (show(f"preparing {size:.0f} MB of text, {n} process(es)", speeds[n], "MB/s") for n in caches)
    print(f"{'':4}ratio {two / one:.2f}")
    one, two = (show(f"    by the time that {n} core(s) worked", worked[n], "MB/s") for n in caches)
    print(f"{'':4}ratio on cores that do nothing else {2 * two / one:.2f}")
    read = [measure(folder, "read", 1, 1, caches[1]) for _ in range(arguments.rounds)]
    show("prepared packed text, one core", [r["tokens"] / r["seconds"] for r in read], "tokens/s")
    show("    by the time that the core worked", [r["tokens"] / r["cpu_seconds"] for r in read], "tokens/s")
    show("    first batch after", [r["first_batch"] for r in read], "s")
    show("    most memory, mapped files included", [r["memory"] / 1e9 for r in read], "GB")
    images: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for number, found in images.items():
            said = measure(folder, "images", number, 2, caches[1])
            found.append(said["images"] / said["seconds"])
    one, two = (show(f"images at 224 px, {n} worker(s)", found, "images/s") for n, found in images.items())
    print(f"{'':4}ratio {two / one:.2f}")


if __name__ == "__main__":
    benchmark.exit_with(main)
