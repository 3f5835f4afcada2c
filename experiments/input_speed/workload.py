"""What the benchmark of the input runs in a process of its own: prints seconds and sizes as JSON.

python experiments/input_speed/workload.py prepare|read|images FOLDER NUMBER
"""

import json
import mmap
import pathlib
import resource
import sys
import time

import numpy as np

from research.data import language, tokenizer
from research.data.dataset import Dataset
from research.data.image import DecodeRandomResizedCrop, Normalize, RandomFlip
from research.data.source import examples

ROW, ROWS, BATCHES = 1024, 32, 400  # tokens of a row, rows of a batch, batches that are timed
IMAGES, SIZE, WARM = 64, 224, 10
FEATURES = ("input_ids", "targets", "target_mask", "attention_mask", "positions")


class Documents:
    """Documents of a text file, which are separated by empty lines."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        stat = path.stat()
        self.fingerprint = f"{path.name} {stat.st_size} {stat.st_mtime_ns}"
        self._ends = np.load(path.with_suffix(".npy"))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": self._text[self._ends[index] : self._ends[index + 1]].decode()}

    @property
    def _text(self) -> mmap.mmap:
        if "_map" not in vars(self):
            with open(self._path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __reduce__(self) -> tuple:
        return Documents, (self._path,)


def text(folder: pathlib.Path) -> Dataset:
    tokens = language.CausalTokens(tokenizer.read(folder / "tokenizer"))
    return Dataset(Documents(folder / "text.txt"), FEATURES, (tokens,), batch_size=ROWS, pack=ROW)


def prepare(folder: pathlib.Path, number: int) -> dict[str, float]:
    dataset, begin, worked = text(folder), time.perf_counter(), cpu()
    dataset.prepare()
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu() - worked, "processes": number}


def cpu() -> float:
    """Return the seconds that cores worked for this process and for those that it started and that have ended."""
    return sum(
        x.ru_utime + x.ru_stime for x in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def read(folder: pathlib.Path, number: int) -> dict[str, float]:
    dataset, begin, cpu = text(folder), time.perf_counter(), time.process_time()
    batches = dataset.batches()
    next(batches)
    first = time.perf_counter() - begin
    begin, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for _ in range(BATCHES):
        tokens += int(np.count_nonzero(next(batches)["attention_mask"]))
    seconds, worked = time.perf_counter() - begin, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first_batch": first, "tokens": tokens, "seconds": seconds, "cpu_seconds": worked, "memory": memory}


def images(folder: pathlib.Path, workers: int) -> dict[str, float]:
    files = [path.read_bytes() for path in sorted((folder / "images").glob("*.jpg"))]
    source = examples([{"image": content, "label": i} for i, content in enumerate(files * 8)])
    ops = (DecodeRandomResizedCrop(SIZE), RandomFlip(), Normalize((0.5,) * 3, (0.5,) * 3))
    batches = Dataset(source, ("image", "label"), ops, IMAGES, workers=workers).batches()
    for _ in range(WARM):
        next(batches)
    begin = time.perf_counter()
    for _ in range(4 * WARM):
        next(batches)
    seconds = time.perf_counter() - begin
    batches.close()
    return {"images": 4 * WARM * IMAGES, "seconds": seconds}


if __name__ == "__main__":
    run = {"prepare": prepare, "read": read, "images": images}[sys.argv[1]]
    found = run(pathlib.Path(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found | {"packages": {"numpy": np.__version__}}))
