"""What is done to one image on its way into a batch.

Ops work on `image`: uint8 [height, width, channels] from `Decode` on, float32 from `Normalize` on. What they draw comes
from `rng`, a function of (seed, position).
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from research.errors import UserError, nearest

MODES = {1: "L", 3: "RGB"}


class Decode:
    """Makes an array of an image: of a file's bytes, a path, or an array."""

    def __init__(self, channels: int = 3, field: str = "image"):
        """Converts to grey where `channels` is 1, to red, green and blue where it is 3."""
        if channels not in MODES:
            raise UserError(f"channels: {channels} is neither 1 nor 3")
        self.channels, self.field = channels, field

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Returns the example with `image`, uint8 [height, width, channels].

        Raises:
          UserError: there is no such file, or it is no image; it is named.
        """
        if self.field not in example:
            raise UserError(f"an example has no image '{self.field}'{nearest(self.field, example)}")
        return example | {"image": decode(example[self.field], self.channels, name_of(example))}


def decode(value: bytes | str | np.ndarray, channels: int, name: str = "") -> np.ndarray:
    """Returns uint8 [height, width, channels]; raises UserError, which says `name`, where it is no image."""
    if isinstance(value, np.ndarray):
        image = PIL.Image.fromarray(value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value)
        return _array(image, channels)
    if isinstance(value, str):
        path = pathlib.Path(value).expanduser()
        if not path.is_file():
            raise UserError(f"there is no image file '{value}'")
        return decode(path.read_bytes(), channels, value)
    try:
        return _array(PIL.Image.open(io.BytesIO(value)), channels)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{name or 'an image'} cannot be decoded: {' '.join(str(error).split())}") from None


def name_of(example: Mapping[str, Any]) -> str:
    """Returns what an example is known by."""
    for key in ("image/filename", "file_name", "image_id", "id"):
        if key in example:
            value = example[key]
            return value.decode() if isinstance(value, bytes) else str(value)
    return ""


def _array(image: PIL.Image.Image, channels: int) -> np.ndarray:
    array = np.asarray(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    return array.reshape(*array.shape[:2], channels)


class RandomFlip:
    """Mirrors half of the images, left to right."""

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Returns the example with its image mirrored or not."""
        return example | {"image": example["image"][:, ::-1]} if rng.random() < 0.5 else example


class Normalize:
    """Makes images float32: scaled to [0, 1], less the mean of each channel, over its standard deviation."""

    def __init__(self, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)):
        """Takes a number for each channel, or one for all."""
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        if not (self.std > 0).all():
            raise UserError(f"std: {tuple(std)} must be positive")

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Returns the example with its image as float32."""
        return example | {"image": (example["image"].astype(np.float32) / 255 - self.mean) / self.std}
