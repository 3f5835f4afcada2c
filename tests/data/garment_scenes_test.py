"""Scenes of garments: boxes are those of the pixels that can be seen, and no garment is in two splits."""

import gzip
import io

import numpy as np
import PIL.Image
import pytest

from research import assets
from research.data import image, source
from research.data.datasets import fashion_mnist, garment_scenes


def pictures(count, seed):
    """Draws garments: rectangles of noise with a hole, on nothing."""
    rng = np.random.default_rng(seed)
    made = np.zeros((count, 28, 28), np.uint8)
    for picture in made:
        top, left = rng.integers(0, 8, 2)
        bottom, right = rng.integers(18, 29, 2)
        picture[top:bottom, left:right] = rng.integers(1, 256, (bottom - top, right - left))
        picture[12:15, 12:15] = 0
    return made


@pytest.fixture
def images():
    return pictures(60, 0)


@pytest.mark.parametrize("number", range(30))
def test_boxes_are_those_of_visible_pixels(number, images, monkeypatch):
    """With garments of one brightness each, in their own size and on nothing, the pixels tell which one they show."""
    values = np.arange(len(images)) * 4 + 10
    images = np.where(images > 0, values[:, None, None], 0).astype(np.uint8)
    monkeypatch.setattr(garment_scenes, "SCALE", (1.0, 1.0))
    monkeypatch.setattr(garment_scenes, "background", lambda rng: np.zeros((96, 96), np.uint8))
    pixels, owner, garments = garment_scenes.scene(np.random.default_rng(number), images, range(60))
    assert set(np.unique(pixels)) == {0, *values[garments]}
    for garment, (top, left, bottom, right) in zip(garments, garment_scenes.boxes(owner, len(garments))):
        rows, columns = np.nonzero(pixels == values[garment])
        expected = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / 96
        np.testing.assert_allclose((top, left, bottom, right), expected)


@pytest.mark.parametrize("number", range(10))
def test_all_that_is_not_background_is_a_garment(number, images, monkeypatch):
    monkeypatch.setattr(garment_scenes, "background", lambda rng: np.zeros((96, 96), np.uint8))
    pixels, owner, _ = garment_scenes.scene(np.random.default_rng(number), images, range(60))
    np.testing.assert_array_equal(pixels > 0, owner >= 0)


def test_pasting_shows_pixels_that_are_not_zero():
    pixels, owner = np.full((96, 96), 77, np.uint8), np.full((96, 96), -1, np.int8)
    picture = np.array([[0, 200, 0], [100, 0, 150]], np.uint8)
    garment_scenes.paste(picture, (10, 20), 0, pixels, owner)
    np.testing.assert_array_equal(pixels[10:12, 20:23], [[77, 200, 77], [100, 77, 150]])
    np.testing.assert_array_equal(owner[10:12, 20:23], [[-1, 0, -1], [0, -1, 0]])
    assert (pixels != 77).sum() == (owner == 0).sum() == 3
    assert garment_scenes.boxes(owner, 1)[0] == pytest.approx((10 / 96, 20 / 96, 12 / 96, 23 / 96))


def test_a_garment_is_cut_out_tightly():
    picture = np.zeros((28, 28), np.uint8)
    picture[4:20, 6:12] = 255
    np.testing.assert_array_equal(garment_scenes.cut_out(picture, 1.0), np.full((16, 6), 255))
    half = garment_scenes.cut_out(picture, 0.5)
    np.testing.assert_allclose(half.shape, (8, 3), atol=2)  # what surrounds it has faint traces of it
    for edge in (half[0], half[-1], half[:, 0], half[:, -1]):
        assert edge.any()


def test_garments_hide_no_more_of_others_than_allowed(images):
    counts = set()
    for number in range(40):
        rng = np.random.default_rng((1, number))
        _, owner, garments = garment_scenes.scene(rng, images, range(60))
        counts.add(len(garments))
        assert len(set(garments)) == len(garments)
        assert all((owner == i).any() for i in range(len(garments)))
    assert counts == {1, 2, 3, 4, 5}
    owner = np.zeros((96, 96), np.int8)  # a garment everywhere: nothing as large as a third of it fits
    assert garment_scenes._place(np.random.default_rng(0), np.ones((56, 56), bool), owner, [96 * 96]) is None
    assert garment_scenes._place(np.random.default_rng(0), np.ones((40, 40), bool), owner, [96 * 96]) is not None


def test_backgrounds_are_nowhere_empty():
    for number in range(10):
        background = garment_scenes.background(np.random.default_rng(number))
        assert background.shape == (96, 96)
        assert background.min() >= 1


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return gzip.compress(header + array.tobytes())


def test_splits_share_no_garment(tmp_path, monkeypatch):
    files, labels = tmp_path / "files", {}
    files.mkdir()
    for seed, (split, start) in enumerate({"train": "train", "test": "t10k"}.items()):
        labels[split] = np.random.default_rng(seed).integers(0, 10, 40).astype(np.uint8)
        (files / f"{start}-images-idx3-ubyte.gz").write_bytes(idx(pictures(40, seed)))
        (files / f"{start}-labels-idx1-ubyte.gz").write_bytes(idx(labels[split]))
    monkeypatch.setattr(assets, "resolve", lambda uri: files if uri == fashion_mnist.PACKAGE else pytest.fail(uri))
    few = {split: (12, *rest) for split, (_, *rest) in garment_scenes.SPLITS.items()}
    monkeypatch.setattr(garment_scenes, "SPLITS", few)
    shown = {}
    for split in few:
        found = source.tfds("garment_scenes", split, data_dir=str(tmp_path / "tfds"))
        assert len(found) == 12
        assert found.label_names["label"] == fashion_mnist.LABELS
        shown[split] = np.concatenate([example["objects"]["garment"] for example in found])
        for example in found:
            numbers = example["objects"]["garment"]
            kind = few[split][1]
            np.testing.assert_array_equal(example["objects"]["label"], labels[kind][numbers])
            pixels = np.asarray(PIL.Image.open(io.BytesIO(example["image"])))
            np.testing.assert_array_equal(pixels[..., None], image.decode(example["image"], 1))
            bbox = np.asarray(example["objects"]["bbox"])
            height_width = (bbox[:, 2:] - bbox[:, :2]) * 96
            assert (height_width >= 1).all()
            assert (height_width <= 28 * 1.3 + 1).all()
    assert shown["validation"].max() < 20 <= shown["test"].min()  # halves of the test pictures
    again = source.tfds("garment_scenes", "test", data_dir=str(tmp_path / "again"))
    first = source.tfds("garment_scenes", "test", data_dir=str(tmp_path / "tfds"))
    assert all(one["image"] == other["image"] for one, other in zip(again, first))
    assert (garment_scenes.SPLITS["train"][1], garment_scenes.SPLITS["test"][1]) == ("train", "test")
