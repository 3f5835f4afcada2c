"""Synthetic images of discs, squares and crosses with exact classes and boxes."""

import numpy as np

from research.data.source import Source
from research.errors import UserError

NAMES = ("disc", "square", "cross")
BRIGHTNESS = ((100, 140), (160, 200), (216, 256))  # per class, so that classes are separable after a few steps


def shapes(count: int = 48, size: int = 28, channels: int = 3, objects: int = 1, seed: int = 0) -> Source:
    """Return `count` examples, each a function of (seed, position).

    Features, as in TFDS's coco: `image` uint8 [size, size, channels], `image_id`, `objects` with `bbox` float32
    [objects, 4] (top, left, bottom, right as shares of the side) and `label` int [objects]; and `label`, the class of
    the first object. Classes alternate.

    Raises:
      UserError: the objects do not fit side by side.
    """
    if objects * 8 > size:
        raise UserError(f"objects: {objects} do not fit into images of {size} pixels")
    return Source([_draw(i, size, channels, objects, seed) for i in range(count)], {"label": NAMES})


def _draw(number: int, size: int, channels: int, objects: int, seed: int) -> dict:
    """Draw objects in strips side by side, so that none hides another."""
    rng = np.random.default_rng((seed, number))
    image = rng.integers(0, 40, (size, size, channels)).astype(np.uint8)
    strip, boxes, labels = size // objects, [], []
    for place in range(objects):
        label, side = (number + place) % len(NAMES), int(rng.integers(max(strip // 2, 5), strip))
        top, left = int(rng.integers(0, size - side + 1)), place * strip + int(rng.integers(0, strip - side + 1))
        window = image[top : top + side, left : left + side]
        window[_mask(label, side)] = rng.integers(*BRIGHTNESS[label], channels)
        boxes.append([top, left, top + side, left + side])
        labels.append(label)
    found = {"bbox": np.asarray(boxes, np.float32) / size, "label": np.asarray(labels)}
    return {"image": image, "image_id": number, "label": labels[0], "objects": found}


def _mask(label: int, side: int) -> np.ndarray:
    """Return where a shape is, bool [side, side]; it touches all four edges."""
    row, column = np.mgrid[:side, :side] - (side - 1) / 2
    return (
        row**2 + column**2 <= (side / 2) ** 2,
        np.ones((side, side), bool),
        (np.abs(row) <= side / 6) | (np.abs(column) <= side / 6),
    )[label]
