"""torchvision's side of the benchmark: the same transforms of PIL images under a DataLoader, printed as JSON."""

import io
import itertools
import json
import pathlib
import sys
import time

import PIL.Image
import torch

# The package index's torchvision is built for CUDA and cannot load its compiled operators beside a PyTorch without.
# The transforms of PIL images need none of them, but importing it wants these two declared.
if torch.version.cuda is None:
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision
from torchvision import transforms
from workload import BATCH_SIZE, LAYERS, MAGNITUDE, MEAN, REPEATS, SIZE, STD, WARM_BATCHES


class Images(torch.utils.data.Dataset):
    def __init__(self, folder: str):
        self.files = [path.read_bytes() for path in sorted(pathlib.Path(folder).glob("*.jpg"))] * REPEATS
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.RandAugment(LAYERS, MAGNITUDE, num_magnitude_bins=11, fill=[128.0] * 3),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(PIL.Image.open(io.BytesIO(self.files[index])).convert("RGB")), index


def main(folder: str, batches: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(Images(folder), BATCH_SIZE, shuffle=True, num_workers=0)
    made = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(WARM_BATCHES):
        next(made)
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        images, _ = next(made)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    if images.shape != (BATCH_SIZE, 3, SIZE, SIZE):
        raise ValueError(f"batches of {images.shape}")
    packages = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "packages": packages}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
