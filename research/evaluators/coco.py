"""Average precision of detectors, computed by pycocotools (Lin 2014)."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from research.data import boxes, image
from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators import batches, numbered
from research.reporting import pictures
from research.task import Batch, Params, Task

# In the order of COCO's summary. AP is the mean over thresholds of the intersection over union from 0.5 to 0.95 and
# over classes; AR1 is the maximum recall with one detection per image; small is below 32 x 32 pixels, large 96 x 96.
METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
FEATURES = ("scores", "classes", "boxes")  # of predictions


@dataclasses.dataclass(frozen=True)
class Coco:
    """Evaluates a detection task on every example of a dataset, each once.

    The ground truth is read from the dataset's source, before its ops: they may resize and pad images, but not crop or
    rotate them. As in COCO, crowds are ignored: they need not be detected, and detections in them are not errors.

    Attributes:
      task: its `predict` is run on each batch.
      mesh: the device mesh.
      data: the evaluation data; its source gives `objects` as TFDS's coco does, its ops end in `boxes.Targets`.
      pictures: the number of examples drawn with their boxes, from the first.
      threshold: the minimum score of a drawn box; metrics use all boxes.
    """

    task: Task
    mesh: Mesh
    data: Dataset
    pictures: int = 8
    threshold: float = 0.5

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float | np.ndarray]:
        """Return those of METRICS that are defined for these objects, in [0, 1], and the picture "boxes".

        Raises:
          UserError: the data contain no objects.
        """
        every = list(batches.run(self._batch, params, self.dataset, self.mesh, check))
        rows = {name: np.concatenate([batch[name] for batch in every]) for name in every[0]}
        real = np.flatnonzero(rows["mask"] > 0)
        order = real[np.argsort(rows["example"][real])]
        sizes, predicted = rows["image_size"][order], [{name: rows[name][i] for name in FEATURES} for i in order]
        truths = [self.data.source[i]["objects"] for i in range(len(order))]
        scores = average_precision(truths, predicted, sizes)
        return scores | ({"boxes": self._picture(truths, predicted)} if self.pictures else {})

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data as it is read, each example with its number."""
        more = [name for name in ("image_size",) if name not in self.data.features]
        return numbered.numbered(self.data, *more)

    def _batch(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        outputs = self.task.predict(params, batch, jax.random.key(0))
        asked = {name: batch[name] for name in ("mask", "example", "image_size")}
        return {name: outputs[name] for name in FEATURES} | asked

    def _picture(self, truths: Sequence[dict[str, Any]], predicted: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """Draw the first examples."""
        shown = range(min(self.pictures, len(truths)))
        images = [image.decode(self.data.source[i]["image"], 3) for i in shown]
        right, found = [], []
        for i, pixels in zip(shown, images):
            size, sure = pixels.shape[:2], predicted[i]["scores"] >= self.threshold
            right.append((in_pixels(boxes.centred(truths[i]["bbox"]), size), np.asarray(truths[i]["label"], int)))
            outputs = {name: predicted[i][name][sure] for name in FEATURES}
            found.append((in_pixels(outputs["boxes"], size), outputs["classes"], outputs["scores"]))
        names = getattr(self.data.source, "label_names", {}).get("label", ())
        title = f"true boxes, and predicted boxes with scores of at least {self.threshold:g}"
        return pictures.boxes(images, right, found, names, title)


def average_precision(
    truths: Sequence[dict[str, Any]], predicted: Sequence[dict[str, np.ndarray]], sizes: np.ndarray
) -> dict[str, float]:
    """Return those of METRICS that are defined: without small objects, there is no AP of small objects.

    Args:
      truths: for each image `bbox` [n, 4] (top, left, bottom, right as shares), `label` [n], and optionally `is_crowd`
        [n] and `area` [n] in pixels, by which COCO tells small from large; by default the area of the box.
      predicted: for each image `scores` [Q], `classes` [Q] and `boxes` [Q, 4] (centre x, centre y, width, height as
        shares).
      sizes: height and width of each image in pixels, [images, 2].

    Raises:
      UserError: the data contain no objects.
    """
    annotations = [entry for i, objects in enumerate(truths) for entry in _annotations(i, objects, sizes[i])]
    if not annotations:
        raise UserError("data: no image contains an object, so average precision is undefined")
    found = [entry for i, outputs in enumerate(predicted) for entry in _results(i, outputs, sizes[i])]
    classes = {entry["category_id"] for entry in annotations}
    right = COCO()
    right.dataset = {
        "images": [{"id": i, "height": int(size[0]), "width": int(size[1])} for i, size in enumerate(sizes)],
        "categories": [{"id": number} for number in sorted(classes)],
        "annotations": [entry | {"id": i} for i, entry in enumerate(annotations, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # silence its progress output
        right.createIndex()
        evaluation = COCOeval(right, right.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats) if value >= 0}


def in_pixels(boxes_nx4: np.ndarray, size: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return (left, top, right, bottom) in pixels of boxes (centre x, centre y, width, height) as shares."""
    height, width = size
    return boxes.corners(np.asarray(boxes_nx4, np.float64)) * np.array([width, height, width, height])


def _annotations(number: int, objects: dict[str, Any], size: np.ndarray) -> list[dict[str, Any]]:
    """Return the true objects of an image in COCO's format."""
    placed = _placed(in_pixels(boxes.centred(objects["bbox"]), size))
    labels = np.asarray(objects["label"], int)
    crowds = np.asarray(objects.get("is_crowd", np.zeros(len(labels))), int)
    areas = np.asarray(objects.get("area", placed[:, 2] * placed[:, 3]), float)
    return [
        {
            "image_id": number,
            "category_id": int(label),
            "bbox": box.tolist(),
            "iscrowd": int(crowd),
            "area": float(area),
        }
        for label, box, crowd, area in zip(labels, placed, crowds, areas)
    ]


def _results(number: int, outputs: dict[str, np.ndarray], size: np.ndarray) -> list[dict[str, Any]]:
    """Return the detections in an image in COCO's format."""
    placed = _placed(in_pixels(outputs["boxes"], size))
    return [
        {"image_id": number, "category_id": int(label), "bbox": box.tolist(), "score": float(score)}
        for label, box, score in zip(outputs["classes"], placed, outputs["scores"])
    ]


def _placed(edges_nx4: np.ndarray) -> np.ndarray:
    """Return (left, top, width, height) of (left, top, right, bottom)."""
    return np.concatenate([edges_nx4[:, :2], edges_nx4[:, 2:] - edges_nx4[:, :2]], axis=-1)
