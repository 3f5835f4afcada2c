"""Fashion-MNIST: from which files it is prepared, that they are read rightly, and that wrong ones are named."""

import gzip
import pathlib

import numpy as np
import pytest

from research import assets
from research.data import image, source
from research.data.datasets import fashion_mnist
from research.errors import UserError

COUNTS = {"train": 7, "test": 4}


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder, compress=True, shape=(28, 28)):
    """Writes the four files; returns split -> images, labels."""
    folder.mkdir(parents=True)
    made = {}
    for seed, (split, prefix) in enumerate(fashion_mnist.FILES.items()):
        rng = np.random.default_rng(seed)
        images, labels = rng.integers(0, 256, (COUNTS[split], *shape)), rng.integers(0, 10, COUNTS[split])
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            path, content = folder / f"{prefix}-{name}-ubyte", idx(array)
            path = path.with_suffix(".gz") if compress else path
            path.write_bytes(gzip.compress(content) if compress else content)
        made[split] = images, labels
    return made


def check(made, data_dir):
    for split, (images, labels) in made.items():
        read = source.tfds("fashion_mnist", split, data_dir=str(data_dir))
        assert read.label_names == {"label": fashion_mnist.LABELS}
        assert [int(example["label"]) for example in read] == labels.tolist()
        for example, expected in zip(read, images, strict=True):
            np.testing.assert_array_equal(image.Decode(1)(example)["image"][..., 0], expected)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(assets, "resolve", lambda uri: pytest.fail(f"it asked for {uri}"))


@pytest.mark.parametrize("compress", [True, False])
def test_a_local_folder_of_idx_files_comes_first(tmp_path, compress):
    made = write(tmp_path / "downloads" / "manual" / "fashion_mnist", compress)
    check(made, tmp_path)


def test_else_the_registry_has_it(tmp_path, monkeypatch):
    made = write(tmp_path / "package")
    asked = []
    monkeypatch.setattr(assets, "resolve", lambda uri: asked.append(uri) or tmp_path / "package")
    check(made, tmp_path / "tfds")
    assert asked == [fashion_mnist.PACKAGE]


def test_else_it_is_downloaded(tmp_path, monkeypatch):
    made = write(tmp_path / "web")

    def refuse(uri):
        raise UserError("no registry")

    def download(self, urls):
        return {name: tmp_path / "web" / pathlib.PurePosixPath(url).name for name, url in urls.items()}

    monkeypatch.setattr(assets, "resolve", refuse)
    monkeypatch.setattr("tensorflow_datasets.download.DownloadManager.download", download)
    check(made, tmp_path / "tfds")


def test_files_that_are_missing_or_wrong_are_named(tmp_path):
    manual = tmp_path / "downloads" / "manual" / "fashion_mnist"
    write(manual)

    def prepare():
        source.tfds("fashion_mnist", data_dir=str(tmp_path))

    labels = manual / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.unlink()
    with pytest.raises(UserError, match=r"fashion_mnist' has no t10k-labels-idx1-ubyte.gz"):
        prepare()
    labels.write_bytes(gzip.compress(idx(np.arange(9))))
    with pytest.raises(UserError, match=r"\(4, 28, 28\), '.*t10k-labels.*' one \(9,\)"):
        prepare()
    labels.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(UserError, match=r"t10k-labels.*' is no idx file of unsigned bytes, or not a whole one"):
        prepare()
    labels.write_bytes(whole)
    prepare()


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01" + bytes(8), idx(np.arange(5)) + b"\0", b"<html>"])
def test_what_is_no_idx_file(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"x' is no idx file of unsigned bytes, or not a whole one"):
        fashion_mnist.read_idx(tmp_path / "x")


@pytest.mark.parametrize("broken", [lambda whole: whole[:-9], lambda whole: whole[:20] + b"\xff" * 9 + whole[29:]])
def test_a_damaged_compressed_file_is_named(tmp_path, broken):
    (tmp_path / "x.gz").write_bytes(broken(gzip.compress(idx(np.arange(200)))))
    with pytest.raises(UserError, match=r"x.gz' cannot be decompressed: "):
        fashion_mnist.read_idx(tmp_path / "x.gz")


def test_images_of_another_size_are_refused(tmp_path):
    write(tmp_path / "downloads" / "manual" / "fashion_mnist", shape=(27, 28))
    with pytest.raises(UserError, match=r"an array \(7, 27, 28\)"):
        source.tfds("fashion_mnist", data_dir=str(tmp_path))
