"""Random changes of how an image looks: colours, RandAugment, erasing.

Ops as in `data.image`; they come before `Normalize`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFile
import PIL.ImageOps

from research.data.image import Image, array_of, draw_window, picture_of, range_of
from research.errors import UserError

GREY = 128  # fills what an image moved away from


class ColorJitter:
    """Changes brightness, contrast, saturation and hue, in random order.

    The first three are multiplied by a factor from [1 - x, 1 + x], not below 0; 0 leaves them as they are. Grey images
    have neither saturation nor hue to change.
    """

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0):
        """Take the greatest changes; `hue` is a share of the colour circle, at most 0.5."""
        if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
            raise UserError("brightness, contrast, saturation: they are at least 0; hue lies in [0, 0.5]")
        self.factors, self.hue = (brightness, contrast, saturation), hue

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with its image's colours changed."""
        image = picture_of(example["image"])
        factors = [rng.uniform(max(1 - x, 0), 1 + x) for x in self.factors]
        shift = rng.uniform(-self.hue, self.hue)
        enhance = (PIL.ImageEnhance.Brightness, PIL.ImageEnhance.Contrast, PIL.ImageEnhance.Color)
        for i in rng.permutation(4):
            if i == 3:
                image = turn_hue(image, shift) if self.hue and image.mode == "RGB" else image
            elif self.factors[i]:
                image = enhance[i](image).enhance(factors[i])
        return example | {"image": array_of(image)}


def turn_hue(image: Image, share: float) -> Image:
    """Return an image of mode RGB with every hue moved on by a share of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda h: (h + int(share * 255)) % 256)
    return PIL.Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _enhance(kind: Callable[[Image], Any]) -> Callable[[Image, float], Image]:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


def _affine(image: Image, *coefficients: float) -> Image:
    """Return an image whose pixel (x, y) is the one at (a x + b y + c, d x + e y + f)."""
    fill = (GREY,) * len(image.getbands())
    return image.transform(image.size, PIL.Image.Transform.AFFINE, coefficients, fillcolor=fill)


# Cubuk 2019, section 3: what is done to an image at a strength in [-1, 1]; ranges of Cubuk 2018, table 6.
AUGMENTATIONS: dict[str, Callable[[Image, float], Image]] = {
    "identity": lambda image, strength: image,
    "auto_contrast": lambda image, strength: PIL.ImageOps.autocontrast(image),
    "equalize": lambda image, strength: PIL.ImageOps.equalize(image),
    "rotate": lambda image, strength: image.rotate(30 * strength, fillcolor=(GREY,) * len(image.getbands())),
    "solarize": lambda image, strength: PIL.ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
    "posterize": lambda image, strength: PIL.ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    "color": _enhance(PIL.ImageEnhance.Color),
    "contrast": _enhance(PIL.ImageEnhance.Contrast),
    "brightness": _enhance(PIL.ImageEnhance.Brightness),
    "sharpness": _enhance(PIL.ImageEnhance.Sharpness),
    "shear_x": lambda image, strength: _affine(image, 1, 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength: _affine(image, 1, 0, 0, 0.3 * strength, 1, 0),
    "translate_x": lambda image, strength: _affine(image, 1, 0, 0.45 * strength * image.width, 0, 1, 0),
    "translate_y": lambda image, strength: _affine(image, 1, 0, 0, 0, 1, 0.45 * strength * image.height),
}


class RandAugment:
    """Changes images by a few of fourteen operations, drawn with replacement (Cubuk 2019).

    A larger magnitude always changes more. "auto_contrast" and "equalize" have none; all others change nothing at 0.
    Rotations, shears, translations and the factors of colour, contrast, brightness and sharpness go either way with
    equal chance.
    """

    def __init__(self, layers: int = 2, magnitude: float = 10):
        """Say how many operations are applied to an image, and how strongly: from 0 to 10, the greatest."""
        if layers < 1 or not 0 <= magnitude <= 10:
            raise UserError(f"layers, magnitude: {layers} and {magnitude}; they are at least 1, and from 0 to 10")
        self.layers, self.magnitude = layers, magnitude

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with its image changed, in the same size."""
        image, operations = picture_of(example["image"]), tuple(AUGMENTATIONS.values())
        for _ in range(self.layers):
            operation, sign = operations[rng.integers(len(operations))], 2 * rng.integers(2) - 1
            image = operation(image, sign * self.magnitude / 10)
        return example | {"image": array_of(image)}


class RandomErasing:
    """Replaces a random window of some images by noise (Zhong 2017, "RE-R"); the defaults are DeiT's (Touvron 2020).

    It comes before `Normalize`: each value of the window is uniform from 0 to 255.
    """

    def __init__(
        self,
        probability: float = 0.25,
        area: Sequence[float] = (0.02, 1 / 3),
        ratio: Sequence[float] = (0.3, 1 / 0.3),
    ):
        """Say how often, and what windows.

        Args:
          probability: share of the images.
          area: least and greatest of a window, as shares of the image's.
          ratio: least and greatest width / height.
        """
        if not 0 <= probability <= 1:
            raise UserError(f"probability: {probability} does not lie in [0, 1]")
        self.probability, self.area, self.ratio = probability, range_of("area", area, 1), range_of("ratio", ratio)

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with its image, or with a copy of it that has a hole."""
        if example["image"].dtype != np.uint8:
            raise UserError("config.data.ops: RandomErasing comes before Normalize")
        if rng.random() >= self.probability:
            return example
        image = example["image"].copy()
        height, width = image.shape[:2]
        window = draw_window(height, width, self.area, self.ratio, rng)
        if window is None:  # no such window fits into so narrow an image
            return example
        left, top, right, bottom = window
        hole = image[top:bottom, left:right]
        hole[:] = rng.integers(0, 256, hole.shape, np.uint8)
        return example | {"image": image}
