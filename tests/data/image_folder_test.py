"""A folder of images by class: layouts, labels, broken files, what is held out, and what is prepared anew."""

import io
import logging
import shutil

import numpy as np
import PIL.Image
import pytest

from research.data import image, source
from research.errors import UserError


def encoded(seed, kind="JPEG", size=12):
    array = np.random.default_rng(seed).integers(0, 256, (size, size + seed % 3, 3)).astype(np.uint8)
    PIL.Image.fromarray(array).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def write(folder, files):
    """Writes name -> seed or content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.lower().endswith("png") else "JPEG"
        path.write_bytes(content if isinstance(content, bytes) else encoded(content, kind))
    return str(folder)


@pytest.fixture
def read(tmp_path):
    """Returns `source.image_folder` with its prepared data in the test's folder."""
    return lambda *args, **kwargs: source.image_folder(*args, data_dir=str(tmp_path / "tfds"), **kwargs)


FLAT = {"cat/a.jpg": 1, "cat/b.PNG": 2, "dog/deeper/c.jpeg": 3, "ant/d.jpg": 4}


def test_a_folder_a_class(read, tmp_path):
    found = read(write(tmp_path / "pets", FLAT))
    assert found.label_names == {"label": ("ant", "cat", "dog")}
    named = {example["file_name"]: example for example in found}
    assert {name: int(example["label"]) for name, example in named.items()} == {
        "ant/d.jpg": 0,
        "cat/a.jpg": 1,
        "cat/b.PNG": 1,
        "dog/deeper/c.jpeg": 2,
    }
    for name, example in named.items():  # the files themselves, not encoded again
        assert example["image"] == (tmp_path / "pets" / name).read_bytes()
        assert image.Decode()(example)["image"].shape[0] == 12


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_a_folder_a_split(read, tmp_path, validation):
    layout = {f"train/{name}": seed for name, seed in FLAT.items()}
    folder = write(tmp_path / "pets", layout | {f"{validation}/dog/x.jpg": 5, "test/cat/y.jpg": 6})
    assert [len(read(folder, split)) for split in ("train", "validation", "test", "train+test")] == [4, 1, 1, 5]
    (held,) = read(folder, "validation")
    assert (held["file_name"], int(held["label"])) == (f"{validation}/dog/x.jpg", 2)
    assert read(folder, "test").label_names == {"label": ("ant", "cat", "dog")}
    with pytest.raises(UserError, match="has no split 'tset'; did you mean 'test'"):
        read(folder, "tset")


def test_classes_may_be_called_as_splits_are(read, tmp_path):
    found = read(write(tmp_path / "vehicles", {"train/a.jpg": 1, "tram/b.jpg": 2}))
    assert found.label_names == {"label": ("train", "tram")}


def test_labels_are_ordered_as_numbers_or_as_given(read, tmp_path):
    folder = write(tmp_path / "digits", {f"{i}/x.jpg": i for i in (10, 2, 1)})
    assert read(folder).label_names["label"] == ("1", "2", "10")
    given = read(folder, labels=("10", "2", "1", "unseen"))
    assert given.label_names["label"] == ("10", "2", "1", "unseen")
    assert {example["file_name"]: int(example["label"]) for example in given} == {
        "1/x.jpg": 2,
        "2/x.jpg": 1,
        "10/x.jpg": 0,
    }


BROKEN = {"cat/cut.jpg": encoded(9)[:200], "dog/empty.jpg": b"", "dog/page.png": b"<html>"}


@pytest.mark.usefixtures("_truncated_images_allowed")
def test_broken_images_are_all_named(read, tmp_path):
    folder = write(tmp_path / "pets", FLAT | BROKEN)
    with pytest.raises(UserError) as info:
        read(folder)
    message = str(info.value)
    assert message.startswith(f"3 of 7 images in '{folder}' are broken: ")
    assert message.endswith("; broken='skip' leaves them out")
    assert "\n" not in message
    assert all(f"'{name}' cannot be decoded: " in message for name in BROKEN)
    write(tmp_path / "pets", dict.fromkeys(BROKEN, 7))  # nothing half-made is in the way
    assert len(read(folder)) == 7


@pytest.fixture
def _truncated_images_allowed(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # TFDS does so


def test_broken_images_are_left_out_if_that_is_wanted(read, tmp_path, caplog):
    folder = write(tmp_path / "pets", FLAT | BROKEN)
    with caplog.at_level(logging.WARNING):
        found = read(folder, broken="skip")
    assert sorted(example["file_name"] for example in found) == sorted(FLAT)
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in BROKEN)
    with pytest.raises(UserError, match="broken"):  # another setting is another dataset
        read(folder)


def test_files_that_are_no_images_are_named_and_hidden_ones_are_not(read, tmp_path, caplog):
    others = {"cat/notes.txt": b"", "readme.md": b"", "loose.jpg": 3}
    hidden = {".DS_Store": b"", "cat/._a.jpg": b"x", "__MACOSX/x.jpg": b"", ".git/x.jpg": b"", "dog/Thumbs.db": b""}
    with caplog.at_level(logging.WARNING):
        assert len(read(write(tmp_path / "pets", FLAT | others | hidden))) == 4
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in others)
    assert not any(name in record.getMessage() for name in hidden)


def test_links_are_followed_but_not_in_circles(read, tmp_path):
    folder = tmp_path / "pets"
    path = write(folder, FLAT)
    write(tmp_path / "more", {"x.jpg": 9})
    (folder / "cat" / "more").symlink_to(tmp_path / "more")
    (folder / "cat" / "self").symlink_to(folder / "cat")
    (folder / "cat" / "more" / "up").symlink_to(folder)
    names = [example["file_name"] for example in read(path)]
    assert len(names) == 5
    assert "cat/more/x.jpg" in names


def test_what_is_held_out_follows_from_the_content(read, tmp_path):
    files = {f"{'ab'[i % 2]}/{i}.jpg": i % 60 for i in range(80)}  # 20 images are there twice
    folder = write(tmp_path / "one", files)
    renamed = write(tmp_path / "two", {name.replace(".jpg", "x.jpg"): seed for name, seed in files.items()})
    held = {}
    for place in (folder, renamed):
        splits = {split: list(read(place, split, held_out=0.25)) for split in ("train", "validation")}
        assert len(splits["validation"]) in (20, 21)
        assert len(splits["train"]) + len(splits["validation"]) == 80
        train, validation = ({example["image"] for example in examples} for examples in splits.values())
        assert not train & validation
        held[place] = validation
    assert held[folder] == held[renamed]
    assert len(read(folder)) == 80


def test_a_changed_folder_is_never_stale_and_a_moved_one_is_not_prepared_again(read, tmp_path):
    folder = write(tmp_path / "pets", FLAT)
    first = list(read(folder))
    prepared = {path: path.stat().st_mtime_ns for path in (tmp_path / "tfds" / "image_folder").iterdir()}
    shutil.move(folder, tmp_path / "moved")
    assert list(read(str(tmp_path / "moved"))) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tfds" / "image_folder").iterdir()} == prepared
    (tmp_path / "moved" / "cat" / "a.jpg").write_bytes(new := encoded(11))
    again = {example["file_name"]: example["image"] for example in read(str(tmp_path / "moved"))}
    assert again["cat/a.jpg"] == new
    write(tmp_path / "moved", {"cat/z.jpg": 12})
    assert len(read(str(tmp_path / "moved"))) == 5


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, {}, "has no folders of images; it needs one for each class"),
        ({"a.jpg": 1}, {}, "has no folders of images"),
        ({"cat/a.jpg": 1}, {}, "holds the one class 'cat' only"),
        ({"cat/a.jpg": 1, "dog/a.txt": b""}, {}, "dog' holds no image, a file that ends in .jpg"),
        ({"train/a/x.jpg": 1, "tset/a/x.jpg": 1}, {}, r"tset' stands beside .* is none; did you mean 'test'\?"),
        ({"test/a/x.jpg": 1, "val/b/x.jpg": 1}, {}, "has test, val, but no 'train'"),
        ({"train/a/x.jpg": 1, "val/b/x.jpg": 1, "validation/a/x.jpg": 1}, {}, "both 'val' and 'validation'"),
        (
            {"train/cat/x.jpg": 1, "train/dog/y.jpg": 1, "test/cta/x.jpg": 1},
            {},
            r"x.jpg': 'cta' is not in the training folder's classes; did you mean 'cat'\?",
        ),
        (FLAT, {"labels": ("ant", "cat", "dgo")}, r"'dog' is not in labels; did you mean 'dgo'\?"),
        (FLAT, {"labels": ("ant", "ant")}, "labels: one is there twice"),
        (FLAT, {"broken": "skipp"}, r"broken: no 'skipp'; did you mean 'skip'\?"),
        (FLAT, {"held_out": 1.0}, "held_out: 1.0"),
        (
            {f"{s}/{c}/x.jpg": 1 for s in ("train", "val") for c in "ab"},
            {"held_out": 0.1},
            "held_out: there is a valid",
        ),
        ({"a/x.jpg": b"", "b/x.jpg": b""}, {"broken": "skip"}, "holds no whole image for 'train'"),
    ],
)
def test_what_is_wrong(read, tmp_path, files, arguments, message):
    (tmp_path / "pets").mkdir()
    with pytest.raises(UserError, match=message) as info:
        read(write(tmp_path / "pets", files), **arguments)
    assert "\n" not in str(info.value)


def test_no_folder(read, tmp_path):
    with pytest.raises(UserError, match="no such file or folder: 'nowhere'"):
        read("nowhere")
    file = tmp_path / "x.jpg"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is no folder"):
        read(str(file))
    folder = write(tmp_path / "pets", FLAT)
    (tmp_path / "pets" / "cat" / "link.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"link.jpg' cannot be read: No such file"):
        read(folder)


def test_it_is_no_dataset_that_is_known_by_name(tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'image_folder'"):
        source.tfds("image_folder", data_dir=str(tmp_path))
