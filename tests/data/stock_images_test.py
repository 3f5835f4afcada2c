"""Images of stock TFDS sets: they come as they are stored, and go through the same ops as all others."""

import io
import itertools

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets
from tensorflow_datasets.core.features import image_feature

from research.data import image, source
from research.data.dataset import Dataset

# The number of classes, and the shape of an image where all have the same.
STOCK = {
    "imagenet2012": (1000, None),
    "cifar10": (10, (32, 32, 3)),
    "cifar100": (100, (32, 32, 3)),
    "oxford_flowers102": (102, None),
    "mnist": (10, (28, 28, 1)),
    "food101": (101, None),
}


@pytest.fixture
def stock(monkeypatch, tmp_path):
    """Draws the examples of stock sets, stored as the real ones are: in image files."""

    def encode(self, array):  # in place of TensorFlow
        picture = PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        picture.save(buffer := io.BytesIO(), "JPEG" if self.encoding_format == "jpeg" else "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", encode)
    with tensorflow_datasets.testing.mock_data(num_examples=6):
        yield lambda name: source.tfds(name, "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", STOCK)
def test_images_come_as_files_and_labels_with_names(name, stock):
    classes, shape = STOCK[name]
    read = stock(name)
    assert len(read) == 6
    assert len(read.label_names["label"]) == classes
    example = read[2]
    assert isinstance(example["image"], bytes)
    channels = shape[-1] if shape else 3
    decoded = image.Decode(channels)(example)["image"]
    assert decoded.dtype == np.uint8
    assert decoded.shape == (shape or (*decoded.shape[:2], 3))
    assert decoded.std() > 0
    assert 0 <= int(example["label"]) < classes


def test_names_of_broken_images_are_those_of_the_set(stock):
    example = stock("imagenet2012")[0]
    assert image.name_of(example) == example["file_name"]


@pytest.mark.parametrize("name", STOCK)
def test_they_become_batches(name, stock):
    channels = (STOCK[name][1] or (0, 0, 3))[-1]
    ops = (image.DecodeRandomResizedCrop(24, channels=channels), image.RandomFlip(), image.Normalize())
    dataset = Dataset(stock(name), ("image", "label"), ops, batch_size=4)
    for batch in itertools.islice(dataset.batches(), 3):
        assert batch["image"].shape == (4, 24, 24, channels)
        assert batch["image"].dtype == np.float32
        assert batch["label"].dtype == np.int32
    assert sum(batch["mask"].sum() for batch in dataset.epoch()) == 6
