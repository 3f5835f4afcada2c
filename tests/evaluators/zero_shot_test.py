"""Zero-shot classification and retrieval: what counts as found, and in which order classes and pairs stand."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.data import tokenizer
from research.data.dataset import Dataset
from research.data.source import examples
from research.errors import UserError
from research.evaluators import zero_shot

CLASSES = ("a", "b", "c")


@dataclasses.dataclass(frozen=True)
class FirstLetter:
    """Represents a text by its class's first letter, wherever it stands, and an image by its number."""

    model: object = None

    def encode_text(self, params, batch):
        letters = jnp.asarray([token("a"), token("b"), token("c")])
        found = (batch["input_ids"][:, :, None] == letters).any(axis=1).astype(jnp.float32)
        return found * params

    def encode_image(self, params, batch):
        return batch["image"]


def token(letter):
    return tokenizer.byte_level().backend.encode(letter).ids[1]


def classification(images, labels, **fields):
    rows = [{"image": np.asarray(image, np.float32), "label": label} for image, label in zip(images, labels)]
    data = Dataset(examples(rows, {"label": CLASSES}), ("image", "label"), batch_size=2)
    fields = {"templates": ("{}", "* {}"), "max_length": 8} | fields
    return zero_shot.Classification(FirstLetter(), sharding.make_mesh(), data, tokenizer.byte_level(), **fields)


PARAMS = jnp.ones(3)


def test_an_image_is_of_the_class_whose_prompts_are_nearest():
    images = [[9, 1, 0], [0, 9, 1], [1, 0, 9], [0, 1, 9], [9, 0, 1]]
    scores = classification(images, [0, 1, 2, 1, 0])(PARAMS)
    assert scores == {"accuracy": pytest.approx(4 / 5)}  # the fourth is taken for a "c"


def test_what_tells_nothing_apart_is_no_better_than_chance():
    images = [[1, 1, 1]] * 6
    same = classification(images, [0, 1, 2] * 2)
    assert same(PARAMS)["accuracy"] == pytest.approx(1 / 3)
    assert same(PARAMS * np.nan)["accuracy"] == 0


def test_classes_stand_in_the_order_of_their_numbers():
    rows = [{"image": np.eye(3, dtype=np.float32)[i], "label": i} for i in range(3)]
    data = Dataset(examples(rows, {"label": ("c", "b", "a")}), ("image", "label"), batch_size=3)
    evaluator = zero_shot.Classification(
        FirstLetter(), sharding.make_mesh(), data, tokenizer.byte_level(), templates=("{}",), max_length=8
    )
    assert evaluator(PARAMS)["accuracy"] == pytest.approx(1 / 3)  # class 0 is "c", which is the third image


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": ("a photo",)}, "templates: 'a photo' must have one {}"),
        ({"templates": ()}, "templates: there are none"),
    ],
)
def test_prompts_that_name_no_class_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        classification([[1, 0, 0]], [0], **fields)


def test_a_class_without_a_name_is_refused():
    with pytest.raises(UserError, match="classes: there are 2, and an image is of number 2"):
        classification([[1, 0, 0]] * 3, [0, 1, 2], classes=("a", "b"))(PARAMS)


def test_ranks_are_those_of_sorting():
    rng = np.random.default_rng(0)
    asked, found = rng.normal(size=(2, 50, 4))
    order = np.argsort(-(asked @ found.T), axis=1, kind="stable")
    expected = [int(np.flatnonzero(row == i)[0]) for i, row in enumerate(order)]
    np.testing.assert_array_equal(zero_shot.own_ranks(asked, found, rows=7), expected)


def test_retrieval_goes_both_ways():
    task = types.SimpleNamespace(
        encode_image=lambda params, batch: batch["image"], encode_text=lambda params, batch: batch["text"]
    )
    image = np.eye(3)[[0, 1, 2]] + 0.1 * np.eye(3)[[1, 2, 0]]
    text = np.eye(3)[[0, 1, 1]]  # the third text is as the second
    rows = [{"image": a.astype(np.float32), "text": b.astype(np.float32)} for a, b in zip(image, text)]
    data = Dataset(examples(rows), ("image", "text"), batch_size=2)
    scores = zero_shot.Retrieval(task, sharding.make_mesh(), data, at=(1, 2))(PARAMS)
    assert scores["image_to_text_recall_1"] == pytest.approx(2 / 3)
    assert scores["text_to_image_recall_1"] == pytest.approx(2 / 3)
    assert scores["image_to_text_recall_2"] == pytest.approx(2 / 3)
    assert scores["text_to_image_recall_2"] == pytest.approx(2 / 3)
