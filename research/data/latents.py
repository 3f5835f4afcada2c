"""Precomputed latents of images, for training latent diffusion models."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from research import storage
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Latents:
    """Random access to the latents in a folder, read from disk on access."""

    folder: pathlib.Path
    label_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """The number of examples."""
        return len(_read(self.folder, "labels"))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image`, float32 [H, W, C], and `label`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: there are {len(self)} examples")
        image = _read(self.folder, "latents")[index].astype(np.float32)
        return {"image": image, "label": int(_read(self.folder, "labels")[index])}


def latents(path: str, split: str = "train") -> Latents:
    """Return the latents in the folder PATH/SPLIT.

    It holds `latents.npy`, float16 or float32 [N, H, W, C], scaled as the model expects them, such as samples of
    Stable Diffusion's autoencoder multiplied by 0.18215; and `labels.npy`, integers [N]. Flipped images are separate
    examples.

    Raises:
      UserError: a file is missing, or their shapes or types do not match.
    """
    folder = storage.fetch(storage.path(path) / split)
    for name in ("latents", "labels"):
        if not (folder / f"{name}.npy").is_file():
            raise UserError(f"path: '{folder}' has no {name}.npy; see research/data/latents.py for what it must hold")
    images, labels = _read(folder, "latents"), _read(folder, "labels")
    kinds = images.dtype.kind == "f" and labels.dtype.kind in "iu"
    if not kinds or images.ndim != 4 or labels.shape != images.shape[:1]:
        found = f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        raise UserError(f"path: '{folder}' must hold floats [N, H, W, C] and integers [N]; it holds {found}")
    return Latents(folder)


def _read(folder: pathlib.Path, name: str) -> np.ndarray:
    try:
        return np.load(folder / f"{name}.npy", mmap_mode="r")
    except (ValueError, EOFError) as error:  # an empty file is an EOFError
        raise UserError(f"path: '{folder / name}.npy' is not a NumPy array: {error}") from None
