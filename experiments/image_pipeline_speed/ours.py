"""This project's side of the benchmark: times batches and prints the seconds as JSON."""

import json
import pathlib
import sys
import time

import grain
import numpy as np
import PIL
from workload import BATCH_SIZE, LAYERS, MAGNITUDE, MEAN, REPEATS, SIZE, STD, WARM_BATCHES

from research.data.augmentation import RandAugment
from research.data.dataset import Dataset
from research.data.image import DecodeRandomResizedCrop, Normalize, RandomFlip
from research.data.source import examples


def main(folder: str, batches: int) -> None:
    files = [path.read_bytes() for path in sorted(pathlib.Path(folder).glob("*.jpg"))]
    source = examples([{"image": content, "label": i} for i, content in enumerate(files * REPEATS)])
    ops = (DecodeRandomResizedCrop(SIZE), RandomFlip(), RandAugment(LAYERS, MAGNITUDE), Normalize(MEAN, STD))
    made = Dataset(source, ("image", "label"), ops, BATCH_SIZE).batches()
    for _ in range(WARM_BATCHES):
        next(made)
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        batch = next(made)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    if batch["image"].shape != (BATCH_SIZE, SIZE, SIZE, 3):
        raise ValueError(f"batches of {batch['image'].shape}")
    packages = {"grain": grain.__version__, "pillow": PIL.__version__, "numpy": np.__version__}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "packages": packages}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
