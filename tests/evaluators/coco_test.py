"""COCO's average precision: of detections whose score is known, and as pycocotools computes it from files."""

import contextlib
import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from research import sharding
from research.data import boxes, image, shapes, source
from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators import coco

FEATURES = ("image", "pixel_mask", "boxes", "classes", "box_mask", "image_size")


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Stands in for a task: finds what is there, as its fields change it."""

    shift: float = 0.0  # of boxes, as a share of their width
    swap: int = 0  # added to the class, modulo 3
    first: int = 100  # of the objects of an image, how many are found
    wrong: float = 0.0  # the score of a box in the corner of each image

    def predict(self, params, batch, rng):
        found = batch["boxes"].at[..., 0].add(self.shift * batch["boxes"][..., 2])
        places = jnp.arange(found.shape[1])
        scores = batch["box_mask"] * (0.9 - 0.01 * places) * (places < self.first)
        corner = jnp.array([0.01, 0.01, 0.02, 0.02])
        found = jnp.where((places < self.first)[:, None], found, corner)
        return {
            "boxes": jnp.pad(found, ((0, 0), (0, 1), (0, 0))).at[:, -1].set(corner),
            "classes": jnp.pad((batch["classes"] + self.swap) % 3, ((0, 0), (0, 1))),
            "scores": jnp.concatenate([scores, jnp.full((len(found), 1), self.wrong)], axis=1),
        }


def evaluate(task, read=None, batch_size=4, **settings):
    read = read or shapes.shapes(count=10, size=48, objects=3)
    ops = (image.Decode(), boxes.Resize(40, 64), image.Normalize(), boxes.Targets(64, 5))
    data = Dataset(read, FEATURES, ops, batch_size=batch_size)
    settings = {"pictures": 0} | settings
    return coco.Coco(task, sharding.make_mesh(), data, **settings)({})


def test_what_is_perfect_scores_one():
    found = evaluate(Oracle())
    defined = {"AP", "AP50", "AP75", "AP_small", "AR1", "AR10", "AR100", "AR_small"}
    assert set(found) == defined  # there are only small objects
    assert {name: found[name] for name in defined - {"AR1"}} == pytest.approx(dict.fromkeys(defined - {"AR1"}, 1.0))


def test_other_classes_score_nothing():
    assert set(evaluate(Oracle(swap=1)).values()) == {0.0}


def test_what_is_missing_costs_recall():
    # Each of the three classes comes once in every image: of the first one found, the class is another in each.
    assert evaluate(Oracle(first=1))["AR100"] == pytest.approx(1 / 3, abs=0.04)


def test_boxes_must_fit():
    # Shifted by 15 % of the width the intersection over union is 0.85 / 1.15 = 0.739: right at 0.5, ..., 0.7.
    found = evaluate(Oracle(shift=0.15))
    assert (found["AP50"], found["AP75"]) == pytest.approx((1.0, 0.0))
    assert found["AP"] == pytest.approx(0.5)


def test_false_boxes_cost_precision_where_they_are_surer():
    assert evaluate(Oracle(wrong=0.1))["AP"] == pytest.approx(1.0)
    assert evaluate(Oracle(wrong=0.99))["AP"] < 0.9


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_any_batch_size_gives_the_same(batch_size):
    task = Oracle(shift=0.1, first=2, wrong=0.88)
    assert evaluate(task, batch_size=batch_size) == evaluate(task, batch_size=4)


def crowded(**more):
    """One image with two objects; the second one is found, too."""
    example = shapes.shapes(count=1, size=48, objects=2)[0]
    return source.examples([example | {"objects": example["objects"] | more}], {"label": shapes.NAMES})


def test_crowds_need_not_be_found_and_may_be():
    alone = crowded(is_crowd=np.array([False, True]))
    assert evaluate(Oracle(), alone)["AP"] == pytest.approx(1.0)  # Targets gives the first one only

    class Both(Oracle):
        def predict(self, params, batch, rng):
            truth = boxes.centred(alone[0]["objects"]["bbox"])[None]
            classes = jnp.asarray(alone[0]["objects"]["label"])[None]
            return {"boxes": jnp.asarray(truth), "classes": classes, "scores": jnp.array([[0.5, 0.9]])}

    assert evaluate(Both(), alone, 1)["AP"] == pytest.approx(1.0)
    assert evaluate(Both(), crowded(), 1)["AP"] == pytest.approx(1.0)


def test_areas_are_those_of_the_annotations():
    found = evaluate(Oracle(first=1), crowded(area=np.array([500.0, 40000.0])))
    assert (found["AP_small"], found["AP_large"]) == pytest.approx((1.0, 0.0))
    assert "AP_medium" not in found


def test_no_object_is_an_error():
    with pytest.raises(UserError, match="data: no image contains an object"):
        evaluate(Oracle(), source.examples([empty() for _ in range(2)], {"label": shapes.NAMES}))


def empty():
    return {
        "image": np.zeros((20, 30, 3), np.uint8),
        "objects": {"bbox": np.zeros((0, 4), np.float32), "label": np.zeros(0, int)},
    }


def test_equals_pycocotools_from_files(tmp_path):
    rng = np.random.default_rng(0)
    truths, predicted, sizes = [], [], rng.integers(50, 400, (12, 2))
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(4)]}
    results = []
    for number, (height, width) in enumerate(sizes.tolist()):
        count, queries = int(rng.integers(0, 7)), 9
        start = rng.uniform(0, 0.6, (count, 2))
        bbox = np.concatenate([start, start + rng.uniform(0.05, 0.4, (count, 2))], axis=1).astype(np.float32)
        label, crowd = rng.integers(0, 4, count), rng.random(count) < 0.15
        areas = rng.uniform(100, 20000, count)
        truths.append({"bbox": bbox, "label": label, "is_crowd": crowd, "area": areas})
        near = rng.integers(0, max(count, 1), queries)
        noise = rng.normal(0, 0.02, (queries, 4))
        guess = (boxes.centred(bbox)[near] if count else np.full((queries, 4), 0.3)) + noise
        classes = np.where(rng.random(queries) < 0.8, label[near] if count else 0, rng.integers(0, 4, queries))
        scores = rng.random(queries)
        predicted.append({"boxes": guess.astype(np.float32), "classes": classes, "scores": scores})
        content["images"].append({"id": number, "height": height, "width": width})
        for (top, left, bottom, right), i, c, a in zip(bbox.tolist(), label.tolist(), crowd.tolist(), areas.tolist()):
            x, y, w, h = left * width, top * height, (right - left) * width, (bottom - top) * height
            entry = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": i}
            content["annotations"].append(entry | {"bbox": [x, y, w, h], "area": a, "iscrowd": int(c)})
        for (x, y, w, h), i, s in zip(predicted[-1]["boxes"].tolist(), classes.tolist(), scores.tolist()):
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            results.append({"image_id": number, "category_id": i, "bbox": box, "score": s})
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        right = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(right, right.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(zip(coco.METRICS, evaluation.stats))
    found = coco.average_precision(truths, predicted, sizes)
    assert 0.1 < found["AP"] < 0.9
    assert found == pytest.approx({name: value for name, value in expected.items() if value >= 0}, abs=1e-6)


def test_pictures():
    found = evaluate(Oracle(), pictures=3, threshold=0.5)
    drawn = found["boxes"]
    assert drawn.dtype == np.uint8
    assert drawn.ndim == 3
    colours = {tuple(colour) for colour in drawn.reshape(-1, 3)[::7].tolist()}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # of the three classes
