"""Scenes of one to five garments: Fashion-MNIST's pictures on textured backgrounds, with exact boxes.

Composed here of the pictures of Xiao 2017 (see `fashion_mnist`), as others compose MNIST's digits. Every scene is a
function of its split and number. Training scenes show training pictures only; those of "validation" show the first half
of the test pictures, those of "test" the second half.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from research.data.datasets import fashion_mnist

SIZE = 96  # the side of a scene in pixels
GARMENTS = (1, 5)  # the least and the most of them
SCALE = (0.7, 1.3)  # of their 28 x 28 pixels
LEAST_VISIBLE = 0.75  # how much of a garment those upon it may not hide
TRIES = 20  # places that are tried before a garment is left out
SPLITS = {  # split -> number of scenes, pictures of which split, from which to which share of them
    "train": (8000, "train", 0.0, 1.0),
    "validation": (500, "test", 0.0, 0.5),
    "test": (1000, "test", 0.5, 1.0),
}

with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class GarmentScenes(tfds.core.GeneratorBasedBuilder):
        """8,000 training, 500 validation and 1,000 test scenes, grey, of 96 x 96 pixels.

        Features: `image`, `image/id`, and `objects`, from the lowest to the uppermost: `bbox` (top, left, bottom, right
        as shares) of the pixels that can be seen, `label`, and `garment`, its number in Fashion-MNIST's files.
        """

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(SIZE, SIZE, 1)),
                "image/id": np.int64,
                "objects": tfds.features.Sequence(
                    {
                        "bbox": tfds.features.BBoxFeature(),
                        "label": tfds.features.ClassLabel(names=fashion_mnist.LABELS),
                        "garment": np.int64,
                    }
                ),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            manual = pathlib.Path(self._data_dir_root) / "downloads" / "manual" / "fashion_mnist"
            files = fashion_mnist.files(dl_manager, manual)
            arrays = {split: [fashion_mnist.read_idx(path) for path in pair] for split, pair in files.items()}
            return {split: self._generate_examples(split, *arrays[SPLITS[split][1]]) for split in SPLITS}

        def _generate_examples(
            self, split: str, images: np.ndarray, labels: np.ndarray
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            count, _, first, last = SPLITS[split]
            choice = range(int(first * len(images)), int(last * len(images)))
            for number in range(count):
                rng = np.random.default_rng((list(SPLITS).index(split), number))
                pixels, owner, garments = scene(rng, images, choice)
                objects = [
                    {"bbox": tfds.features.BBox(*box), "label": int(labels[garment]), "garment": garment}
                    for garment, box in zip(garments, boxes(owner, len(garments)))
                ]
                yield number, {"image": PIL.Image.fromarray(pixels), "image/id": number, "objects": objects}


def scene(rng: np.random.Generator, images: np.ndarray, choice: range) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Draw a scene.

    Args:
      rng: where all that is random comes from.
      images: uint8 [n, 28, 28], 0 where there is no garment.
      choice: which of them may be shown.

    Returns:
      The scene, uint8 [SIZE, SIZE]; which garment each pixel shows, counted from the lowest, -1 for the background,
      int8 [SIZE, SIZE]; and which images the garments are.
    """
    pixels, owner = background(rng), np.full((SIZE, SIZE), -1, np.int8)
    garments: list[int] = []
    totals: list[int] = []  # their pixels
    wanted = rng.integers(GARMENTS[0], GARMENTS[1] + 1)
    for garment in rng.choice(len(choice), wanted, replace=False) + choice.start:
        picture = cut_out(images[garment], rng.uniform(*SCALE))
        if place := _place(rng, picture > 0, owner, totals):
            paste(picture, place, len(garments), pixels, owner)
            garments.append(int(garment))
            totals.append(int((picture > 0).sum()))
    return pixels, owner, garments


def cut_out(picture: np.ndarray, scale: float) -> np.ndarray:
    """Return a garment in another size, without the empty rows and columns around it."""
    side = round(scale * len(picture))
    resized = np.asarray(PIL.Image.fromarray(picture).resize((side, side), PIL.Image.Resampling.BILINEAR))
    rows, columns = np.nonzero(resized)
    return resized[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def paste(picture: np.ndarray, place: tuple[int, int], number: int, pixels: np.ndarray, owner: np.ndarray) -> None:
    """Put a garment's pixels, those that are not 0, with its top and left at `place`; changes the two arrays."""
    window = tuple(slice(start, start + length) for start, length in zip(place, picture.shape))
    pixels[window][picture > 0] = picture[picture > 0]
    owner[window][picture > 0] = number


def background(rng: np.random.Generator) -> np.ndarray:
    """Draw a background of clouds and grain, uint8 [SIZE, SIZE], nowhere 0."""
    coarse = PIL.Image.fromarray(rng.uniform(-1, 1, (6, 6)).astype(np.float32))
    clouds = np.asarray(coarse.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC))
    light = rng.uniform(30, 100) + rng.uniform(5, 35) * clouds
    return np.clip(light + rng.normal(0, rng.uniform(2, 10), (SIZE, SIZE)), 1, 255).astype(np.uint8)


def boxes(owner: np.ndarray, count: int) -> list[tuple[float, float, float, float]]:
    """Return (top, left, bottom, right), as shares, of the pixels that show each garment."""
    found = []
    for number in range(count):
        rows, columns = np.nonzero(owner == number)
        edges = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / owner.shape[0]
        found.append((float(edges[0]), float(edges[1]), float(edges[2]), float(edges[3])))
    return found


def _place(rng: np.random.Generator, mask: np.ndarray, owner: np.ndarray, totals: list[int]) -> tuple[int, int] | None:
    """Draw the top and left of a garment, bool [h, w], where it hides too much of no other; None if that fails.

    `totals` are the pixels that the others have, be they hidden or not.
    """
    seen = np.bincount(owner[owner >= 0], minlength=len(totals))
    for _ in range(TRIES):
        top, left = (int(rng.integers(SIZE - length + 1)) for length in mask.shape)
        below = owner[top : top + mask.shape[0], left : left + mask.shape[1]][mask]
        hidden = np.bincount(below[below >= 0], minlength=len(totals))
        if (seen - hidden >= LEAST_VISIBLE * np.asarray(totals)).all():
            return top, left
    return None
