"""Folders in COCO's format, and TFDS's own coco: the same features, whatever can be wrong named."""

import io
import json
import logging
import types

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets
from tensorflow_datasets.object_detection import coco

from research.data import boxes, image, source
from research.data.dataset import Dataset
from research.errors import UserError

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
SIZES = [(40, 60), (50, 30), (64, 64), (20, 80)]  # height, width


@pytest.fixture
def folder(tmp_path):
    """Writes four images and their annotations; returns the folder."""
    (tmp_path / "images").mkdir()
    for number, size in enumerate(SIZES):
        picture(*size, number).save(tmp_path / "images" / f"{number}.png")
    annotate(tmp_path / "train.json")
    return tmp_path


def picture(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def annotate(path, changes=None, numbers=range(4)):
    """Writes annotations of the images with these numbers; `changes` are applied to what is written."""
    content = {
        "images": [
            {"id": 100 + i, "file_name": f"{i}.png", "height": SIZES[i][0], "width": SIZES[i][1]} for i in numbers
        ],
        "annotations": [
            {"id": 1, "image_id": 100, "category_id": 7, "bbox": [6, 8, 30, 20], "area": 300.5, "iscrowd": 0},
            {"id": 2, "image_id": 100, "category_id": 3, "bbox": [50.5, 0, 12, 10], "area": 90, "iscrowd": 1},
            {"id": 3, "image_id": 102, "category_id": 3, "bbox": [0, 0, 64, 64]},
        ],
        "categories": [dict(category) for category in CATEGORIES],
    }
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] - 100 in numbers]
    for change in [changes] if changes else []:
        change(content)
    path.write_text(json.dumps(content))
    return str(path)


def read(folder, **settings):
    settings = {"images": str(folder / "images"), "annotations": str(folder / "train.json")} | settings
    return source.coco_folder(**settings, data_dir=str(folder / "tfds"))


def test_images_come_as_they_are_with_their_objects(folder):
    found = read(folder)
    assert found.label_names == {"label": ("cat", "dog")}
    assert len(found) == 4
    example = found[0]
    assert example["image"] == (folder / "images" / "0.png").read_bytes()
    assert (example["image/filename"], example["image/id"]) == ("0.png", 100)
    objects = example["objects"]
    height, width = SIZES[0]
    expected = [[8 / height, 6 / width, 28 / height, 36 / width], [0, 50.5 / width, 10 / height, 1]]
    np.testing.assert_allclose(objects["bbox"], expected, rtol=1e-6)  # the second reached out, and is clipped
    np.testing.assert_array_equal(objects["label"], [1, 0])
    np.testing.assert_array_equal(objects["category_id"], [7, 3])
    np.testing.assert_array_equal(objects["is_crowd"], [False, True])
    np.testing.assert_allclose(objects["area"], [300.5, 90])
    assert len(found[1]["objects"]["label"]) == 0
    assert found[2]["objects"]["area"][0] == 64 * 64


def test_batches(folder):
    ops = (image.Decode(), boxes.Resize(32, 48), image.Normalize(), boxes.Targets(48, 3))
    features = ("image", "pixel_mask", "boxes", "classes", "box_mask", "image_size")
    (batch,) = Dataset(read(folder), features, ops, batch_size=4).epoch()
    assert batch["image"].shape == (4, 48, 48, 3)
    order = np.argsort(batch["image_size"][:, 1])  # widths 30, 60, 64, 80
    np.testing.assert_array_equal(batch["image_size"][order], [SIZES[i] for i in (1, 0, 2, 3)])
    np.testing.assert_array_equal(batch["box_mask"][order].sum(-1), [0, 1, 1, 0])
    np.testing.assert_allclose(batch["boxes"][order[1], 0], [21 / 60, 18 / 40, 30 / 60, 20 / 40], rtol=1e-6)


def test_what_is_changed_is_prepared_anew(folder):
    assert list(read(folder)[0]["objects"]["label"]) == [1, 0]
    annotate(folder / "train.json", lambda content: content["annotations"].pop(0))
    assert list(read(folder)[0]["objects"]["label"]) == [0]
    picture(*SIZES[0], 99).save(folder / "images" / "0.png")
    assert read(folder)[0]["image"] == (folder / "images" / "0.png").read_bytes()


def test_splits(folder):
    annotate(folder / "train.json", numbers=(0, 1))
    annotate(folder / "test.json", numbers=(2, 3), changes=lambda c: c["categories"].pop(0))
    test = read(folder, split="test", test_annotations=str(folder / "test.json"))
    assert [example["image/filename"] for example in test] == ["2.png", "3.png"]
    assert test.label_names == {"label": ("cat", "dog")}  # the training file's
    annotate(folder / "train.json")
    parts = [read(folder, held_out=0.25, split=split) for split in ("train", "validation")]
    names = [{example["image/filename"] for example in part} for part in parts]
    assert [len(part) for part in names] == [3, 1]
    assert not names[0] & names[1]
    with pytest.raises(UserError, match="validation_images needs validation_annotations"):
        read(folder, validation_images=str(folder / "images"))


def test_categories_of_one_name_are_told_apart(folder):
    annotate(folder / "train.json", lambda content: content["categories"].append({"id": 0, "name": "cat"}))
    assert read(folder).label_names == {"label": ("cat (0)", "cat (3)", "dog")}


def spoil(position, **changes):
    return lambda content: content["annotations"][position].update(changes)


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (
            spoil(0, bbox=[1, 2, 0, 3]),
            r"annotation 1 of '0.png' has the box \[1, 2, 0, 3\], which has no area",
            [1, 0, 1, 0],
        ),
        (spoil(0, bbox=[60, 2, 5, 3]), r"\[60, 2, 5, 3\], outside of its 60 x 40 pixels", [1, 0, 1, 0]),
        (spoil(1, bbox=[1, 2, 3]), r"annotation 2 .* \[1, 2, 3\], not \[x, y, width, height\]", [1, 0, 1, 0]),
        (spoil(2, category_id=9), "annotation 3 of '2.png' is of category 9, which is not there", [2, 0, 0, 0]),
        (spoil(2, image_id=9), "annotation 3 is of image 9, which is not there", [2, 0, 0, 0]),
        (spoil(2, id="a"), "annotation a of '2.png' has an id that is no integer", [2, 0, 0, 0]),
        (
            lambda c: c["images"][1].update(id="a"),
            "image 1 has the id 'a', where COCO's format has an integer",
            [2, 1, 0],
        ),
        (lambda c: c["images"][1].update(id=100), "image 1 has no id of its own and file_name", [2, 1, 0]),
        (
            lambda c: c["images"][1].update(file_name="x.png"),
            r"'.*x.png' cannot be read: No such file or directory",
            [2, 1, 0],
        ),
        (
            lambda c: c["images"][0].update(width=40, height=60),
            r"'0.png' has 60 x 40 pixels \(upright\), annotated were 40 x 60",
            [0, 1, 0],
        ),
    ],
)
def test_what_cannot_be_right_is_named_or_left_out(folder, change, message, left, caplog):
    annotate(folder / "train.json", change)
    with pytest.raises(UserError, match=message + r"; broken='skip' leaves them out$"):
        read(folder)
    with caplog.at_level(logging.WARNING):
        found = read(folder, broken="skip")
    assert [len(example["objects"]["label"]) for example in found] == left
    assert "left out" in caplog.text


def test_broken_images_are_named_or_left_out(folder):
    content = (folder / "images" / "2.png").read_bytes()
    (folder / "images" / "2.png").write_bytes(content[: len(content) // 2])
    (folder / "images" / "1.png").write_text("no image")
    with pytest.raises(UserError, match=r"^2 mistakes: '1.png' cannot be decoded: .*; '2.png' cannot be decoded"):
        read(folder)
    assert [example["image/id"] for example in read(folder, broken="skip")] == [100, 103]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "it is no object of lists"),
        ('{"images": [], "anotations": [], "categories": []}', "no list of objects 'annotations'; did you mean 'anot"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}', "is no category with an id"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "names no whole image"),
    ],
)
def test_files_of_another_format_are_named(folder, content, message):
    (folder / "train.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_settings_are_checked(folder):
    with pytest.raises(UserError, match="broken: no 'skipp'; did you mean 'skip'"):
        read(folder, broken="skipp")
    with pytest.raises(UserError, match="is no folder"):
        read(folder, images=str(folder / "train.json"))
    with pytest.raises(UserError, match="is no file"):
        read(folder, annotations=str(folder / "images"))
    annotate(folder / "test.json", lambda content: content["categories"][0].update(name="emu"))
    with pytest.raises(UserError, match=r"test.json': category 7 is 'emu', in the training file it is 'dog'"):
        read(folder, test_annotations=str(folder / "test.json"))


# --- TFDS's own coco ------------------------------------------------------------------------------


def content_of(height, width):
    picture(height, width, 0).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


COCO = {
    "image": content_of(48, 64),
    "image/filename": b"000000000139.jpg",
    "image/id": 139,
    "objects": {
        "id": np.array([1, 2]),
        "area": np.array([300, 3072]),
        "bbox": np.array([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]], np.float32),
        "label": np.array([0, 79]),
        "is_crowd": np.array([False, True]),
    },
}


@pytest.fixture
def without_tensorflow(monkeypatch):
    """TFDS's module of coco asks TensorFlow for the name of a type, and for nothing else that reading needs."""
    monkeypatch.setattr(coco, "tf", types.SimpleNamespace(int64=np.int64))


def test_stock_coco_goes_the_same_way(without_tensorflow, tmp_path):
    with tensorflow_datasets.testing.mock_data(num_examples=2, as_data_source_fn=lambda *_, **__: [COCO] * 2):
        stock = source.tfds("coco/2017", "validation", data_dir=str(tmp_path))
        ours = boxes.renumbered(stock, [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)])
    assert len(stock.label_names["label"]) == 80
    assert len(ours.label_names["label"]) == 91
    assert image.name_of(stock[0]) == "000000000139.jpg"
    ops = (image.Decode(), boxes.Resize(24, 40), image.Normalize(), boxes.Targets(40, 4))
    dataset = Dataset(ours, ("image", "pixel_mask", "boxes", "classes", "box_mask", "image_size"), ops, batch_size=2)
    (batch,) = dataset.epoch()
    np.testing.assert_allclose(batch["boxes"][0, 0], [0.75, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(batch["classes"][0], [1, 0, 0, 0])  # the crowd, of class 90, is left out
    np.testing.assert_array_equal(batch["box_mask"][0], [1, 0, 0, 0])
    np.testing.assert_array_equal(batch["image_size"], [[48, 64]] * 2)
    assert batch["pixel_mask"].sum() == 2 * 24 * 32


def test_a_coco_that_was_prepared_elsewhere_is_read_without_tensorflow(tmp_path, monkeypatch):
    def generate(self, split):
        feature = COCO | {"objects": [{k: v[i] for k, v in COCO["objects"].items()} for i in range(2)]}
        for found in feature["objects"]:
            found["bbox"] = tensorflow_datasets.features.BBox(*found["bbox"].tolist())
        yield 0, feature | {"image/filename": f"{split}.jpg"}

    with monkeypatch.context() as patch:
        patch.setattr(coco, "tf", types.SimpleNamespace(int64=np.int64))
        patch.setattr(coco.Coco, "_split_generators", lambda self, _: {"train": generate(self, "train")})
        builder = source._made(lambda: tensorflow_datasets.builder("coco/2017", data_dir=str(tmp_path)))
        builder.info.features["objects"].feature["label"].names = [f"class {i}" for i in range(80)]
        builder.download_and_prepare(file_format="array_record")
    found = source.tfds("coco/2017", "train", data_dir=str(tmp_path))
    assert found.label_names["label"][79] == "class 79"
    assert found[0]["image/filename"] == "train.jpg"
    assert found[0]["image"] == COCO["image"]
    np.testing.assert_array_equal(found[0]["objects"]["label"], [0, 79])
    with pytest.raises(UserError, match="'coco/2017' has no split 'validation'"):
        source.tfds("coco/2017", "validation", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="'coco/2014' cannot be opened here: No module named 'tensorflow'"):
        source.tfds("coco/2014", "train", data_dir=str(tmp_path))
