"""What is done to one image on its way into a batch.

Ops work on `image`: uint8 [height, width, channels] from `Decode` on, float32 from `Normalize` on. What they draw comes
from `rng`, a function of (seed, position). Usual lists of ops:

  training     DecodeRandomResizedCrop, RandomFlip, RandAugment or ColorJitter, RandomErasing, Normalize
  evaluation   Decode, Resize, CenterCrop, Normalize
"""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFile
import PIL.ImageOps

from research import storage
from research.errors import UserError, nearest

Image = PIL.Image.Image
Size = int | Sequence[int]
Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels

MODES = {1: "L", 3: "RGB"}
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
FILTERS = {"bilinear": PIL.Image.Resampling.BILINEAR, "bicubic": PIL.Image.Resampling.BICUBIC}
TURNS = {  # EXIF's orientation -> what sets the image upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


# --- reading --------------------------------------------------------------------------------------


class Decode:
    """Makes an array of an image: of a file's bytes, a path, or an array."""

    def __init__(self, channels: int = 3, field: str = "image", min_side: int = 0):
        """Say what is made of which field.

        Args:
          channels: 1 for grey, 3 for red, green and blue.
          field: where the image is.
          min_side: pixels. A JPEG file may be decoded at a half, a quarter or an eighth of its size, which is several
            times faster, as long as no side becomes shorter than this; 0 always decodes all of it. With twice the size
            that images are resized to afterwards the result hardly differs. See also `DecodeRandomResizedCrop`.
        """
        if channels not in MODES:
            raise UserError(f"channels: {channels} is neither 1 nor 3")
        self.channels, self.field, self.min_side = channels, field, min_side

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with `image`, uint8 [height, width, channels].

        Raises:
          UserError: there is no such file, or it is no image, or not a whole one; it is named.
        """
        return example | {"image": decode(self.value(example), self.channels, name_of(example), self.min_side)}

    def value(self, example: Mapping[str, Any]) -> Any:
        """Return the image as the example has it."""
        if self.field not in example:
            raise UserError(f"an example has no image '{self.field}'{nearest(self.field, example)}")
        return example[self.field]


def decode(value: bytes | str | np.ndarray, channels: int, name: str = "", min_side: int = 0) -> np.ndarray:
    """Return an image upright (as EXIF's orientation says), uint8 [height, width, channels].

    Transparent parts are shown on white, as a browser shows them; 16 bits a channel become 8.

    Args:
      value: a file's bytes, its path, or an array uint8 [height, width] or [height, width, 1, 3 or 4].
      channels: 1 for grey, 3 for red, green and blue.
      name: what to call it in messages.
      min_side: see `Decode`.

    Raises:
      UserError: it is no image, or not a whole one.
    """
    if isinstance(value, np.ndarray):
        return _from_array(value, channels, name)
    with _reading(value, name) as image:
        if min_side:
            image.draft(None, (min_side, min_side))
        return array_of(_converted(image, channels))


def name_of(example: Mapping[str, Any]) -> str:
    """Return what an example is known by."""
    for key in ("image/filename", "file_name", "image_id", "id"):
        if key in example:
            value = example[key]
            return value.decode() if isinstance(value, bytes) else str(value)
    return ""


@contextlib.contextmanager
def _reading(value: bytes | str, name: str) -> Iterator[Image]:
    """Open a file, whose pixels are not read yet; whatever goes wrong with it becomes a UserError that names it."""
    if isinstance(value, str):
        path, name = storage.path(value), value
        if not path.is_file():
            raise UserError(f"there is no image file '{value}'")
        value = path.read_bytes()
    name = _called(name)
    if not isinstance(value, bytes):
        raise UserError(f"{name} is {type(value).__name__}, neither a path nor a file's bytes")
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False  # TFDS may have set it, and half of an image would pass for a whole one
    try:
        yield PIL.Image.open(io.BytesIO(value))
    except PIL.UnidentifiedImageError:
        raise UserError(f"{name} cannot be decoded: it is no image of a known format") from None
    except Exception as error:  # each of PIL's formats raises what it stumbles over
        raise UserError(f"{name} cannot be decoded: {' '.join(str(error).split())}") from None


def _called(name: str) -> str:
    return f"'{name}'" if name else "an image"


def _orientation(image: Image) -> int:
    """Return EXIF's orientation of an image that is not loaded yet; 1, upright, where it has none that means one."""
    if image.format == "TIFF":
        return 1  # PIL turns these itself
    try:
        found = image.getexif().get(PIL.ExifTags.Base.Orientation)
    except Exception:  # notes that cannot be read do not make a picture unreadable
        return 1
    return found if found in TURNS else 1


def _converted(image: Image, channels: int) -> Image:
    """Load an image; return it upright, in the mode of `channels`."""
    turn = TURNS.get(_orientation(image))
    image.load()
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode '{image.mode}', whose range is not known")
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in TRANSPARENT or "transparency" in image.info:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _from_array(value: np.ndarray, channels: int, name: str) -> np.ndarray:
    value = value[..., None] if value.ndim == 2 else value
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] not in (1, 3, 4):
        shape = f"{value.dtype} {list(value.shape)}"
        raise UserError(f"{_called(name)} is {shape}, not uint8 [height, width] or [height, width, 1, 3 or 4]")
    return value if value.shape[-1] == channels else array_of(_converted(picture_of(value), channels))


def picture_of(array: np.ndarray) -> Image:
    """Return an array uint8 [height, width, 1 or 3] as a PIL image."""
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def array_of(image: Image) -> np.ndarray:
    """Return a PIL image as an array uint8 [height, width, channels]."""
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], -1)


# --- where to look --------------------------------------------------------------------------------


class RandomResizedCrop:
    """Cuts out a random window and resizes it (Szegedy 2014, section 6: the "inception crop").

    The window's area is uniform, the logarithm of its ratio of width to height too; its place is uniform. An image too
    narrow or too flat for that gives the largest window in its middle that has an allowed ratio.
    """

    def __init__(
        self,
        size: Size,
        area: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
    ):
        """Say what windows become what.

        Args:
          size: of the result in pixels: the side of a square, or height and width.
          area: least and greatest, as shares of the image's.
          ratio: least and greatest width / height.
          interpolation: "bilinear" or "bicubic", over all pixels that become one.
        """
        self.size, self.interpolation = _pair(size), _check_filter(interpolation)
        self.area, self.ratio = range_of("area", area, 1), range_of("ratio", ratio)

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with its image as uint8 [*size, channels]."""
        height, width = example["image"].shape[:2]
        window = self.window(height, width, rng)
        return example | {"image": resize(example["image"], self.size, self.interpolation, window)}

    def window(self, height: int, width: int, rng: np.random.Generator) -> Window:
        """Draw a window of an image of `height` and `width` pixels."""
        if window := draw_window(height, width, self.area, self.ratio, rng):
            return window
        w = max(min(width, round(height * self.ratio[1])), 1)
        h = max(min(height, round(width / self.ratio[0])), 1)
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def draw_window(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Window | None:
    """Draw a window of an image; None where ten were too wide or too high."""
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return None


class DecodeRandomResizedCrop:
    """`Decode` and `RandomResizedCrop` in one, of a file no more than the window needs.

    The window is drawn first, as it would be of the whole image. Then a JPEG file is decoded at a half, a quarter or
    an eighth of its size where the window still has twice as many pixels each way as the result: photos of many
    megapixels are read several times faster and hardly look different.
    """

    def __init__(
        self,
        size: Size,
        area: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        channels: int = 3,
        field: str = "image",
    ):
        """Take the arguments of both."""
        self.decode, self.crop = Decode(channels, field), RandomResizedCrop(size, area, ratio, interpolation)

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with `image`, uint8 [*size, channels]."""
        value = self.decode.value(example)
        if isinstance(value, np.ndarray):
            return self.crop(self.decode(example), rng)
        with _reading(value, name_of(example)) as image:
            turned = _orientation(image) > 4
            width, height = image.size[::-1] if turned else image.size
            left, top, right, bottom = self.crop.window(height, width, rng)
            factor = min((bottom - top) // (2 * self.crop.size[0]), (right - left) // (2 * self.crop.size[1]))
            if factor > 1:
                image.draft(None, (math.ceil(image.width / factor), math.ceil(image.height / factor)))
            image = _converted(image, self.decode.channels)
        x, y = image.width / width, image.height / height
        window = (left * x, top * y, right * x, bottom * y)
        image = image.resize(self.crop.size[::-1], FILTERS[self.crop.interpolation], window)
        return example | {"image": array_of(image)}


class Resize:
    """Makes images as large as is wanted."""

    def __init__(self, size: Size, interpolation: str = "bilinear"):
        """Say how large.

        Args:
          size: one number makes the shorter side as long and keeps the shape; two are the height and the width.
          interpolation: "bilinear" or "bicubic", over all pixels that become one.
        """
        self.size, self.interpolation = _pair(size), _check_filter(interpolation)
        self.keep_shape = isinstance(size, int)

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with its image resized."""
        height, width = example["image"].shape[:2]
        size = self.size
        if self.keep_shape:  # the longer side is cut off to whole pixels, as in torchvision and Transformers
            size = (size[0] * height // min(height, width), size[0] * width // min(height, width))
        return example | {"image": resize(example["image"], size, self.interpolation)}


def resize(
    image: np.ndarray,
    size: Sequence[int],
    interpolation: str = "bilinear",
    window: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Return an image uint8 [H, W, C] in another size.

    Args:
      image: the image.
      size: height and width in pixels.
      interpolation: "bilinear" or "bicubic"; where the image becomes smaller, over all pixels that become one.
      window: (left, top, right, bottom) in pixels of the part that is meant; None for all.
    """
    if window is None and image.shape[:2] == tuple(size):
        return image
    return array_of(picture_of(image).resize((size[1], size[0]), FILTERS[interpolation], window))


class CenterCrop:
    """Cuts out the middle."""

    def __init__(self, size: Size):
        """Take the side of a square, or height and width, in pixels."""
        self.size = _pair(size)

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with the middle of its image; raise UserError where the image is smaller."""
        top, left = (round(room / 2) for room in _room(example, self.size))
        return example | {"image": _cut(example["image"], top, left, self.size)}


class RandomCrop:
    """Cuts out a random place, as is usual for small images (He 2015, section 4.2)."""

    def __init__(self, size: Size, padding: int = 0, fill: int = 0):
        """Say how much is cut out of what.

        Args:
          size: the side of a square, or height and width, in pixels.
          padding: pixels that are put around the image first.
          fill: what they are, 0 to 255.
        """
        self.size, self.fill = _pair(size), fill
        self.around = ((padding, padding), (padding, padding), (0, 0))

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with a part of its image; raise UserError where the padded image is smaller."""
        padded = example | {"image": np.pad(example["image"], self.around, constant_values=self.fill)}
        top, left = (int(rng.integers(room + 1)) for room in _room(padded, self.size))
        return example | {"image": _cut(padded["image"], top, left, self.size)}


class RandomFlip:
    """Mirrors half of the images, left to right."""

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with its image mirrored or not."""
        if rng.random() >= 0.5:
            return example
        image = example["image"]
        if image.dtype != np.uint8:
            return example | {"image": image[:, ::-1]}
        # PIL rewrites the pixels in a third of the time in which numpy reads them backwards later.
        return example | {"image": array_of(picture_of(image).transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT))}


def _room(example: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
    """Return how many pixels an image is higher and wider than `size`."""
    height, width = example["image"].shape[:2]
    if height < size[0] or width < size[1]:
        name = _called(name_of(example))
        raise UserError(f"{name} of {height} x {width} pixels is smaller than {size[0]} x {size[1]}; resize it first")
    return height - size[0], width - size[1]


def _cut(image: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    return image[top : top + size[0], left : left + size[1]]


def _pair(size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"size: {size} is neither a number of pixels nor a height and a width")
    return pair[0], pair[1]


def range_of(name: str, pair: Sequence[float], most: float = math.inf) -> tuple[float, float]:
    """Return the bounds of a range in (0, most], or raise UserError that calls them `name`."""
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
        raise UserError(f"{name}: {tuple(pair)} is not the least and the greatest of a range in (0, {most:g}]")
    return pair[0], pair[1]


def _check_filter(interpolation: str) -> str:
    if interpolation not in FILTERS:
        raise UserError(f"interpolation: no '{interpolation}'{nearest(interpolation, FILTERS)}")
    return interpolation


# --- how it looks ---------------------------------------------------------------------------------


class Normalize:
    """Makes images float32: scaled to [0, 1], less the mean of each channel, over its standard deviation."""

    def __init__(self, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)):
        """Take a number for each channel, or one for all."""
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        if not (self.std > 0).all():
            raise UserError(f"std: {tuple(std)} must be positive")

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with its image as float32."""
        image = example["image"]
        height, width, channels = image.shape
        if image.dtype != np.uint8 or any(len(x) not in (1, channels) for x in (self.mean, self.std)):
            raise UserError(
                f"config.data.ops: Normalize takes uint8 of {max(len(self.mean), len(self.std))} channels, "
                f"not {image.dtype} of {channels}"
            )
        # Whole rows at once: numpy is slow where the last axis has three elements.
        scale, shift = (np.resize(x, width * channels) for x in (1 / (255 * self.std), self.mean / self.std))
        rows = np.multiply(image.reshape(height, -1), scale, dtype=np.float32)
        rows -= shift
        return example | {"image": rows.reshape(height, width, channels)}
