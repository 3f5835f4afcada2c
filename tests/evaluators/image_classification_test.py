"""Scores of images and their pictures: the same scores as without, and the right images under the right names."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from research import sharding
from research.data.dataset import Dataset
from research.data.image import Decode, Normalize
from research.errors import UserError
from research.evaluators.classification import Scores
from research.evaluators.image_classification import ImageScores
from research.reporting import pictures
from research.tasks.image_classification import ImageClassification

NAMES = ("hat", "shoe", "bag")
ROWS = 11


class Shade(nn.Module):
    """Takes an image for the class that its first pixel says."""

    num_outputs: int = 3

    inputs = ("image",)

    @nn.compact
    def __call__(self, image):
        said = self.param("factor", nn.initializers.constant(9.0), ()) * image[:, 0, 0, 0]
        return -((said[:, None] - 9.0 * np.arange(3) / 2) ** 2)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Images of one shade: example i says class i % 3; those of class 2 are labelled so only among the first six."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        label = index % 3 if index < 6 else min(index % 3, 1)
        return {"image": np.full((4, 4, 1), [1, 127, 255][index % 3] - index % 2, np.uint8), "label": label}


def evaluator(kind, **fields):
    ops = (Decode(1), Normalize((0.0,), (1.0,)))
    data = Dataset(Rows(), ("image", "label"), ops, batch_size=4)
    return kind(ImageClassification(Shade(), label_names=NAMES), sharding.make_mesh(), data, **fields)


PARAMS = {"factor": np.float32(9.0)}


def test_the_scores_are_those_without_pictures():
    scores = ("accuracy", "macro_f1")
    plain = evaluator(Scores, scores=scores)(PARAMS)
    found = evaluator(ImageScores, scores=scores)(PARAMS)
    assert {name: value for name, value in found.items() if isinstance(value, float)} == pytest.approx(plain)
    assert plain["accuracy"] == pytest.approx(10 / 11)  # all but example 8, which says class 2
    for name in ("confusion", "mistakes"):
        assert found[name].dtype == np.uint8
        assert found[name].ndim == 3
        assert found[name].std() > 5
    assert evaluator(ImageScores, scores=scores, mistakes=0)(PARAMS) == pytest.approx(plain)


def test_the_pictures_show_what_they_say(monkeypatch):
    shown = {}

    def grid(images, titles, **options):
        shown.update(images=images, titles=titles, **options)
        return np.zeros((1, 1, 3), np.uint8)

    def confusion(counts, names, title):
        shown.update(counts=counts, names=names)
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(pictures, "grid", grid)
    monkeypatch.setattr(pictures, "confusion", confusion)
    evaluator(ImageScores, mistakes=1)(PARAMS)
    np.testing.assert_array_equal(shown["counts"], [[4, 0, 0], [0, 4, 1], [0, 0, 2]])
    assert shown["names"] == NAMES
    (image,), (title,) = shown["images"], shown["titles"]
    assert title.startswith("shoe\npredicted bag, ")
    assert title.endswith(" %")
    np.testing.assert_allclose(image, np.full((4, 4, 1), 255) / 255, atol=1e-6)  # example 8
    assert "The 1 most confident of 1 errors" in shown["title"]


def test_a_model_without_mistakes_has_no_picture_of_them():
    class Perfect(Rows):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": index % 3}

    perfect = evaluator(ImageScores)
    perfect = dataclasses.replace(perfect, data=dataclasses.replace(perfect.data, source=Perfect()))
    found = perfect(PARAMS)
    assert found["accuracy"] == 1
    assert "mistakes" not in found


def test_images_are_viewed_as_they_were_before_normalisation():
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
    ops = (Decode(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    data = Dataset(Rows(), ("image",), ops)
    (row,) = data.transform({"image": stored})
    np.testing.assert_allclose(pictures.pixels(row["image"], data.ops) * 255, stored, atol=1e-3)


@pytest.mark.parametrize("count", [3, 41])
def test_a_confusion_matrix_is_drawn_for_few_classes_and_many(count):
    counts = np.random.default_rng(0).integers(0, 9, (count, count))
    picture = pictures.confusion(counts, [f"class {i}" for i in range(count)], "title")
    assert picture.dtype == np.uint8
    assert picture.shape[-1] == 3


def test_what_does_not_go_together():
    with pytest.raises(UserError, match=r"mistakes: -1 must be 0 \(no pictures\) or more"):
        evaluator(ImageScores, mistakes=-1)
    task = ImageClassification(Shade(), "sigmoid")
    with pytest.raises(UserError, match="mistakes: must be 0 for 'sigmoid', which does not predict one class"):
        ImageScores(task, sharding.make_mesh(), evaluator(Scores).data)


def test_evaluating_twice_compiles_once():
    twice = evaluator(ImageScores, mistakes=0)
    assert twice.dataset is twice.dataset
    assert twice(PARAMS) == twice(jax.tree.map(np.copy, PARAMS))
