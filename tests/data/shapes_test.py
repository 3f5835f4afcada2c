"""Drawn shapes: what is drawn is what the boxes and the labels say."""

import numpy as np
import pytest

from research.data.shapes import NAMES, shapes
from research.errors import UserError


@pytest.mark.parametrize("objects", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_boxes_are_exact_and_labels_follow_each_other(objects, channels):
    read = shapes(count=12, size=40, channels=channels, objects=objects)
    assert read.label_names == {"label": NAMES}
    for number, example in enumerate(read):
        assert example["image"].shape == (40, 40, channels)
        assert example["image"].dtype == np.uint8
        assert example["image_id"] == number
        assert example["label"] == example["objects"]["label"][0] == number % 3
        drawn = (example["image"] >= 100).any(-1)  # the ground is darker
        boxes = np.rint(example["objects"]["bbox"] * 40).astype(int)
        assert example["objects"]["bbox"].dtype == np.float32
        assert ((example["objects"]["bbox"] >= 0) & (example["objects"]["bbox"] <= 1)).all()
        for top, left, bottom, right in boxes:
            inside = drawn[top:bottom, left:right]
            assert inside.any(0)[[0, -1]].all()  # the shape touches all edges of its box
            assert inside.any(1)[[0, -1]].all()
            drawn[top:bottom, left:right] = False
        assert not drawn.any()  # nothing but what has a box


def test_shapes_are_what_they_are_called():
    for example in shapes(count=9, size=60):
        top, left, bottom, right = np.rint(example["objects"]["bbox"][0] * 60).astype(int)
        filled = (example["image"][top:bottom, left:right] >= 100).any(-1).mean()
        name = NAMES[example["label"]]
        assert {"disc": 0.7 < filled < 0.9, "square": filled == 1, "cross": 0.4 < filled < 0.75}[name], (name, filled)


def test_an_example_is_a_function_of_seed_and_position():
    first, again, other = shapes(10), shapes(20), shapes(10, seed=1)
    for i in range(10):
        np.testing.assert_array_equal(first[i]["image"], again[i]["image"])
        assert (first[i]["image"] != other[i]["image"]).any()
    assert (first[0]["image"] != first[3]["image"]).any()


def test_too_many_objects():
    with pytest.raises(UserError, match="objects: 4 do not fit into images of 28 pixels"):
        shapes(objects=4)
