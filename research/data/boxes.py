"""What is done to an image and to the boxes of its objects, together, on their way into a batch.

An example has `image`, as in `research.data.image`, and `objects`: `bbox` float32 [n, 4] (top, left, bottom, right as
shares of the image's height and width), `label` int [n] and, if you like, `is_crowd` bool [n]. What else `objects` has
goes with its object and is not changed: `area` is that in the file's image. Without `objects`, as where something is to
be predicted, the image alone is changed. Usual lists of ops:

  training     image.Decode, RandomFlip, RandomResize or Choose, augmentation.ColorJitter, image.Normalize, Targets
  evaluation   image.Decode, Resize, image.Normalize, Targets
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from research.data import image
from research.data.dataset import Example
from research.data.prepared import with_rng
from research.data.source import Source
from research.errors import UserError, nearest

# --- ops ------------------------------------------------------------------------------------------


class RandomFlip:
    """Mirrors half of the images, left to right."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example mirrored or not."""
        if rng.random() >= 0.5:
            return example
        return _with_boxes(example | {"image": example["image"][:, ::-1]}, _mirrored)


class RandomTurn:
    """Turns images by none, one, two or three quarters, each as often: for photographs from above."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example turned, anticlockwise."""
        quarters = int(rng.integers(4))
        turned = _sized(example) | {"image": np.rot90(example["image"], quarters)}
        for _ in range(quarters):
            turned = _with_boxes(turned, _turned)
        return turned


class Resize:
    """Gives images a shorter side of a certain length, unless the longer one would become too long."""

    def __init__(self, shorter: int, longer: int, interpolation: str = "bilinear"):
        """Say how large.

        Args:
          shorter: what the shorter side becomes, in pixels; less where `longer` demands it.
          longer: the most that the longer side may become.
          interpolation: "bilinear" or "bicubic", over all pixels that become one.
        """
        if not 0 < shorter <= longer:
            raise UserError(f"shorter: {shorter} must be at least 1 and at most `longer`, {longer}")
        if interpolation not in image.FILTERS:
            raise UserError(f"interpolation: no '{interpolation}'{nearest(interpolation, image.FILTERS)}")
        self.shorter, self.longer, self.interpolation = shorter, longer, interpolation

    def __call__(self, example: Example) -> Example:
        """Return the example resized; the boxes, as shares, stay what they are."""
        size = self.size(*example["image"].shape[:2])
        return _sized(example) | {"image": image.resize(example["image"], size, self.interpolation)}

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image becomes; the longer side is cut off to whole pixels."""
        low, high = min(height, width), max(height, width)
        shorter = min(float(self.shorter), self.longer * low / high)
        sides = max(round(shorter), 1), max(int(shorter * high / low), 1)
        return sides if height <= width else sides[::-1]


class RandomResize:
    """`Resize` with a shorter side that is drawn: DETR's scale jitter (Carion 2020, section A.4)."""

    def __init__(self, shorter: Sequence[int], longer: int, interpolation: str = "bilinear"):
        """Take the lengths that are equally likely; see `Resize` for the rest."""
        if not shorter:
            raise UserError("shorter: it needs at least one length")
        self.choices = [Resize(length, longer, interpolation) for length in shorter]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example resized."""
        return self.choices[rng.integers(len(self.choices))](example)


class RandomCrop:
    """Cuts out a random window; its height and its width are uniform and independent.

    Boxes are clipped to it.
    """

    def __init__(self, least: int, most: int, least_visible: float = 0.0):
        """Say what is cut out and what stays.

        Args:
          least: of either side, in pixels; images that are smaller keep that side.
          most: of either side.
          least_visible: a box goes where no more than this share of its area is left, or nothing. DETR's is 0.
        """
        if not 0 < least <= most:
            raise UserError(f"least: {least} must be at least 1 and at most `most`, {most}")
        if not 0 <= least_visible < 1:
            raise UserError(f"least_visible: {least_visible} must lie in [0, 1)")
        self.least, self.most, self.least_visible = least, most, least_visible

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return a part of the example."""
        sides = np.array(example["image"].shape[:2])
        size = np.array([rng.integers(min(self.least, side), min(self.most, side) + 1) for side in sides])
        start = rng.integers(sides - size + 1)
        (top, left), (bottom, right) = start, start + size
        cut = _sized(example) | {"image": example["image"][top:bottom, left:right]}
        return _with_boxes(cut, lambda objects: clipped(objects, start / sides, size / sides, self.least_visible))


class Choose:
    """Applies one of several lists of ops, each of them as often."""

    def __init__(self, choices: Sequence[Sequence[Callable[..., Any]]]):
        """Take the lists, of which one may be empty."""
        if not choices:
            raise UserError("choices: it needs at least one list of ops")
        self.choices = [[with_rng(op) for op in ops] for ops in choices]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return what one list makes of the example."""
        for call in self.choices[rng.integers(len(self.choices))]:
            example = call(example, rng)
        return example


class Targets:
    """Makes arrays of fixed shapes: what detectors take, and what they are trained on. To be put last.

    Crowds, which are no single objects, are left out, and so is what lies outside of the image.
    """

    def __init__(self, size: int, max_boxes: int, too_many: str = "error"):
        """Say how much room there is.

        Args:
          size: S, the height and width of what images are padded to, with zeros at the bottom and right.
          max_boxes: N, the most objects in an image.
          too_many: of more objects, an "error" that names the image; "drop" keeps the N largest ones.
        """
        if too_many not in ("error", "drop"):
            raise UserError(f"too_many: '{too_many}' is neither 'error' nor 'drop'")
        if size < 1 or max_boxes < 1:
            raise UserError(f"size: {size} and `max_boxes`, {max_boxes}, must be at least 1")
        self.size, self.max_boxes, self.too_many = size, max_boxes, too_many

    def __call__(self, example: Example) -> Example:
        """Return the example with its targets.

        `image` float32 [S, S, C]; `pixel_mask` float32 [S, S], 1 at the image's pixels, 0 at padding; `image_size`
        int32 [2], height and width of the image before it was resized or cut.

        Where it has objects, `boxes` float32 [N, 4], (centre x, centre y, width, height) as shares of the width and
        height of the image without padding; `classes` int32 [N]; `box_mask` float32 [N], 1 at objects.

        Raises:
          UserError: the image is too large, or not of floats, or it has too many objects.
        """
        pixels = example["image"]
        height, width, channels = pixels.shape
        if pixels.dtype != np.float32:
            raise UserError("config.data.ops: Targets needs an image of floats; put image.Normalize before it")
        if max(height, width) > self.size:
            raise UserError(
                f"config.data.ops: {_name(example)} has {height} x {width} pixels, more than the {self.size} of "
                "Targets; put boxes.Resize before it"
            )
        padded = np.zeros((self.size, self.size, channels), np.float32)
        padded[:height, :width] = pixels
        real = np.zeros((self.size, self.size), np.float32)
        real[:height, :width] = 1
        boxes = self._boxes(example) if "objects" in example else {}
        return _sized(example) | {"image": padded, "pixel_mask": real} | boxes

    def _boxes(self, example: Example) -> dict[str, np.ndarray]:
        objects = clipped(without_crowds(example["objects"]), np.zeros(2), np.ones(2))
        boxes, classes = centred(objects["bbox"]), np.asarray(objects["label"], np.int32)
        if len(boxes) > self.max_boxes:
            if self.too_many == "error":
                raise UserError(
                    f"config.data.ops: {_name(example)} has {len(boxes)} objects, more than the max_boxes of Targets, "
                    f"{self.max_boxes}; raise it, or let too_many='drop' keep the largest"
                )
            largest = np.sort(np.argsort(-boxes[:, 2] * boxes[:, 3], kind="stable")[: self.max_boxes])
            boxes, classes = boxes[largest], classes[largest]
        count, room = len(boxes), self.max_boxes - len(boxes)
        return {
            "boxes": np.pad(boxes, ((0, room), (0, 0))),
            "classes": np.pad(classes, (0, room)),
            "box_mask": (np.arange(self.max_boxes) < count).astype(np.float32),
        }


# --- objects --------------------------------------------------------------------------------------


def centred(boxes: np.ndarray) -> np.ndarray:
    """Return (centre x, centre y, width, height) of boxes (top, left, bottom, right), both [n, 4]."""
    top, left, bottom, right = np.asarray(boxes, np.float32).reshape(-1, 4).T
    return np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], axis=-1)


def corners(boxes: np.ndarray) -> np.ndarray:
    """Return (left, top, right, bottom) of boxes (centre x, centre y, width, height), both [..., 4]."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def clipped(
    objects: Mapping[str, Any], start: np.ndarray, size: np.ndarray, least_visible: float = 0.0
) -> dict[str, np.ndarray]:
    """Return the objects of a window, their boxes as shares of it.

    Args:
      objects: of the whole image.
      start: top and left of the window, as shares.
      size: height and width of the window, as shares.
      least_visible: objects go where no more than this share of their area is left, or nothing.
    """
    before = np.asarray(objects["bbox"], np.float64).reshape(-1, 2, 2)  # two corners of (y, x)
    after = np.clip((before - start) / size, 0, 1)
    area, left = _areas(before), _areas(after) * np.prod(size)
    boxes = np.asarray(after, np.float32).reshape(-1, 4)
    return chosen({**objects, "bbox": boxes}, (left > least_visible * area) & (_areas(boxes.reshape(-1, 2, 2)) > 0))


def without_crowds(objects: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the objects that are single ones."""
    crowds = np.asarray(objects.get("is_crowd", np.zeros(len(objects["label"]))), bool)
    return chosen(objects, ~crowds)


def chosen(objects: Mapping[str, Any], which: np.ndarray) -> dict[str, np.ndarray]:
    """Return the objects where `which`, bool [n], is true."""
    return {name: np.asarray(values)[which] for name, values in objects.items()}


def renumbered(source: Source, ids: Sequence[int]) -> "Renumbered":
    """Give classes other numbers, as a published model may have them: class i becomes ids[i].

    A number that no class has is called "N/A 12", say, for names must differ where they are exported. COCO's 80
    classes, for instance, are 91 in DETR's published weights.

    Raises:
      UserError: there are not as many numbers as classes, or one is there twice.
    """
    names = source.label_names.get("label", ())
    if len(ids) != len(names) or len(set(ids)) != len(ids) or min(ids) < 0:
        raise UserError(f"ids: {len(names)} classes need as many different numbers, not {tuple(ids)}")
    renamed = [f"N/A {number}" for number in range(max(ids) + 1)]
    for number, name in zip(ids, names):
        renamed[number] = name
    return Renumbered(source, np.asarray(ids), {**source.label_names, "label": tuple(renamed)})


@dataclasses.dataclass(frozen=True)
class Renumbered:
    """A source whose objects have other classes; see `renumbered`."""

    source: Source
    ids: np.ndarray
    label_names: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example."""
        example = self.source[index]
        label = self.ids[np.asarray(example["objects"]["label"], int)]
        return example | {"objects": {**example["objects"], "label": label}}


def _areas(corners: np.ndarray) -> np.ndarray:
    """Return the areas of boxes [n, 2, 2]; nothing has less than 0."""
    return np.prod(np.maximum(corners[:, 1] - corners[:, 0], 0), axis=-1)


def _mirrored(objects: Mapping[str, Any]) -> dict[str, Any]:
    top, left, bottom, right = np.asarray(objects["bbox"], np.float32).reshape(-1, 4).T
    return {**objects, "bbox": np.stack([top, 1 - right, bottom, 1 - left], axis=-1)}


def _turned(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Turn boxes by a quarter, anticlockwise: what was on the right is at the top."""
    top, left, bottom, right = np.asarray(objects["bbox"], np.float32).reshape(-1, 4).T
    return {**objects, "bbox": np.stack([1 - right, top, 1 - left, bottom], axis=-1)}


def _with_boxes(example: Example, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Example:
    return example | {"objects": change(example["objects"])} if "objects" in example else example


def _sized(example: Example) -> Example:
    """Return the example with the size that its image had before any op changed it."""
    return {"image_size": np.array(example["image"].shape[:2], np.int32)} | example


def _name(example: Example) -> str:
    name = image.name_of(example)
    return f"image '{name}'" if name else "an image"
