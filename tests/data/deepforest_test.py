"""Tiles of aerial photographs: trees where they were, every pixel in one split alone."""

import numpy as np
import PIL.Image
import pytest

from research import assets
from research.data import image, source
from research.data.datasets import deepforest
from research.errors import UserError

SIZES = {  # height, width
    "2019_YELL_2_528000_4978000_image_crop2": (1300, 700),
    "2019_YELL_2_541000_4977000_image_crop": (530, 270),
    "OSBS_029": (400, 400),
    "SOAP_061": (400, 400),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes photographs with a red rectangle for every tree, and their annotations."""
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        rng = np.random.default_rng(seed)
        pixels = np.full((height, width, 3), (0, 60, 0), np.uint8)
        objects = []
        for top in range(20, height - 80, 100):
            for left in range(20, width - 80, 100):
                h, w = rng.integers(20, 60, 2)
                pixels[top : top + h, left : left + w, 0] = 255
                edges = {"xmin": left, "ymin": top, "xmax": left + w, "ymax": top + h}
                box = "".join(f"<{key}>{value}</{key}>" for key, value in edges.items())
                objects.append(f"<object><name>Tree</name><bndbox>{box}</bndbox></object>")
        PIL.Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    monkeypatch.setattr(assets, "resolve", lambda uri: tmp_path if uri == deepforest.SOURCE else pytest.fail(uri))
    return tmp_path


def read(package, split):
    return source.tfds("deepforest", split, data_dir=str(package / "tfds"))


def test_every_pixel_is_in_one_split_and_once_in_those_that_judge(package):
    seen = {name: {} for name in SIZES}
    for split in ("train", "validation", "test", "other_sites"):
        for example in read(package, split):
            name = example["image/filename"].removesuffix(".png")
            count = seen[name].setdefault(split, np.zeros(SIZES[name], int))
            top, left, bottom, right = example["region"]
            count[top:bottom, left:right] += 1
            assert 90 <= bottom - top <= 170
            assert 90 <= right - left <= 175
    for name, splits in seen.items():
        whole = sum((count > 0).astype(int) for count in splits.values())
        np.testing.assert_array_equal(whole, np.ones(SIZES[name]))
        assert all(count.max() == 1 for split, count in splits.items() if split != "train")
    assert set(seen["2019_YELL_2_528000_4978000_image_crop2"]) == {"train", "validation"}
    assert set(seen["2019_YELL_2_541000_4977000_image_crop"]) == {"test"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_are_where_the_trees_are(split, package):
    crowds = 0
    for example in read(package, split):
        pixels = image.decode(example["image"], 3)
        height, width = pixels.shape[:2]
        objects = example["objects"]
        covered = np.zeros((height, width), bool)
        for box in objects["bbox"]:
            top, left, bottom, right = np.round(box * [height, width, height, width]).astype(int)
            assert (pixels[top:bottom, left:right, 0] == 255).all()
            covered[top:bottom, left:right] = True
        np.testing.assert_array_equal(covered, pixels[..., 0] == 255)
        assert not any(objects["label"])
        crowds += int(sum(objects["is_crowd"]))
    assert crowds > 0
    assert read(package, split).label_names["label"] == ("tree",)


def test_less_than_half_of_a_tree_is_no_object(tmp_path):
    PIL.Image.new("RGB", (2 * deepforest.TILE, deepforest.TILE)).save(tmp_path / "a.png")
    edge = deepforest.TILE
    boxes = [(edge - 30, edge + 10), (edge - 10, edge + 30)]  # columns: mostly in the first, or in the second tile
    parts = [f"<bndbox><xmin>{a}</xmin><ymin>5</ymin><xmax>{b}</xmax><ymax>9</ymax></bndbox>" for a, b in boxes]
    (tmp_path / "a.xml").write_text(f"<a>{''.join(parts)}</a>")
    first, second = deepforest.examples(tmp_path, deepforest.Region("a"))
    assert [found["is_crowd"] for found in first["objects"]] == [False, True]
    assert [found["is_crowd"] for found in second["objects"]] == [True, False]
    np.testing.assert_allclose(second["objects"][1]["bbox"], (5 / edge, 0, 9 / edge, 30 / edge))


def test_a_file_without_boxes_is_named(tmp_path):
    (tmp_path / "a.xml").write_text("<bndbox><xmin>1</xmin></bndbox>")
    with pytest.raises(UserError, match=r"a.xml' is no file of boxes in Pascal VOC's format"):
        deepforest.read(tmp_path / "a.xml")
