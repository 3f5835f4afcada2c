"""Times the input pipeline here and torchvision's transforms under PyTorch's DataLoader, in turns, on one core.

    python experiments/image_pipeline_speed/benchmark.py --peer-python PEERS/bin/python --output runs/image_speed

Run it from the project's root, with this project's Python, on a machine that does nothing else; PEERS is an environment
with torch and torchvision. Both sides read the same JPEG files of about 500 x 375 pixels, drawn here, from memory;
decode them, cut out an inception crop of 224 pixels, mirror half, apply RandAugment(2, 10), normalise and stack batches
of 32. A side's speed is the images of the timed batches over the seconds that they took, after a few that warm it up.
Beside it stand the images over the seconds that the core worked for them, which other programs change less.
"""

import argparse
import functools
import pathlib
import sys

import numpy as np
import PIL.Image
import workload

from research.reporting import benchmark

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {"ours": "ours.py", "torchvision": "peer.py"}
IMAGES, QUALITY = 64, 90


def draw(folder: pathlib.Path) -> None:
    """Write JPEG files as large, in pixels and about in bytes, as ImageNet's: gradients, discs and texture."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        rng = np.random.default_rng(number)
        width, height = 500 + int(rng.integers(-20, 21)), 375 + int(rng.integers(-20, 21))
        row, column = np.mgrid[:height, :width][..., None]
        image = 128 + 60 * np.sin(row / rng.uniform(20, 90, 3)) + 60 * np.cos(column / rng.uniform(20, 90, 3))
        for _ in range(8):
            x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(15, 90)
            inside = ((row - y) ** 2 + (column - x) ** 2 < radius**2)[..., 0]
            image[inside] = rng.uniform(0, 255, 3)
        image += rng.normal(0, 14, (height, width, 1))
        picture = PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:03}.jpg", quality=QUALITY)


def run(arguments: argparse.Namespace, side: str, round_number: int) -> float:
    """Run one side once, record it, and return its images per second."""
    python = sys.executable if side == "ours" else arguments.peer_python
    said = benchmark.run([python, HERE / SIDES[side], arguments.output / "images", arguments.batches], threads=1)
    count = arguments.batches * workload.BATCH_SIZE
    speed = count / said["seconds"]
    sizes = [path.stat().st_size for path in (arguments.output / "images").iterdir()]
    settings = {key.lower(): value for key, value in vars(workload).items() if key.isupper()}
    benchmark.record(
        arguments.output / side / f"round-{round_number}",
        settings | {"images": IMAGES, "bytes_an_image": sum(sizes) // IMAGES, "batches": arguments.batches},
        said,
        {"images_per_second": speed, "images_per_cpu_second": count / said["cpu_seconds"]},
    )
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=pathlib.Path, required=True, help="an interpreter with torchvision")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/image_speed"), help="where to work")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side runs (default: 5)")
    parser.add_argument("--batches", type=int, default=20, help="batches that are timed in a run (default: 20)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.batches) < 1:
        parser.error("--rounds and --batches are at least 1")
    draw(arguments.output / "images")
    measure = functools.partial(run, arguments)
    benchmark.alternate(measure, tuple(SIDES), arguments.rounds, "images")


if __name__ == "__main__":
    benchmark.exit_with(main)
