"""Latents read from the user's own files."""

import numpy as np
import pytest

from research.data.dataset import Dataset
from research.data.latents import latents
from research.errors import UserError


def write(folder, images, labels, split="train"):
    (folder / split).mkdir(parents=True)
    np.save(folder / split / "latents.npy", images)
    np.save(folder / split / "labels.npy", labels)
    return str(folder)


def test_they_come_as_they_are(tmp_path):
    images = np.random.default_rng(0).normal(size=(5, 4, 4, 2)).astype(np.float16)
    source = latents(write(tmp_path / "l", images, np.arange(5)), "train")
    assert len(source) == 5
    assert source[3]["label"] == 3
    np.testing.assert_array_equal(source[3]["image"], images[3].astype(np.float32))
    with pytest.raises(IndexError):
        source[5]
    batches = list(Dataset(source, ("image", "label"), batch_size=2).epoch())
    assert [batch["image"].shape for batch in batches] == [(2, 4, 4, 2)] * 3
    assert sum(batch["mask"].sum() for batch in batches) == 5


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 4, 4), np.float16), np.zeros(3, int), r"float16 \[3, 4, 4\] and int64 \[3\]"),
        (np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, int), "it holds uint8"),
        (np.zeros((3, 4, 4, 1), np.float32), np.zeros(2, int), r"int64 \[2\]"),
        (np.zeros((3, 4, 4, 1), np.float32), np.zeros(3), r"float64 \[3\]"),
    ],
)
def test_files_that_do_not_belong_together(images, labels, message, tmp_path):
    with pytest.raises(UserError, match=message):
        latents(write(tmp_path / "l", images, labels))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"train' has no latents.npy; see research/data/latents.py"):
        latents(str(tmp_path))
    write(tmp_path / "l", np.zeros((3, 4, 4, 1)), np.zeros(3, int))
    for content in (b"no array", b""):
        (tmp_path / "l" / "train" / "latents.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"latents.npy' is not a NumPy array"):
            latents(str(tmp_path / "l"))
