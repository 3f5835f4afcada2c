"""Fashion-MNIST: 70,000 grey pictures of 28 x 28 pixels of ten kinds of clothing.

Xiao, Rasul and Vollgraf (2017), "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms".
The four idx files are taken from the first place that has them: `downloads/manual/fashion_mnist` in TFDS's folder, the
Debian package dataset-fashion-mnist, or the address that TFDS knows.
"""

import gzip
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.image_classification import mnist

from research import assets
from research.errors import UserError

PACKAGE = (
    "apt://dataset-fashion-mnist=0.0~git20200523.55506a9-1/usr/share/datasets/fashion-mnist"
    "#sha256=39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
)
FILES = {"train": "train", "test": "t10k"}
LABELS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class FashionMnist(tfds.core.GeneratorBasedBuilder):
        """60,000 training and 10,000 test images, in the order of the files. Features: `image`, `label`.

        Name, version and features are those of TFDS's own fashion_mnist, so that one prepared elsewhere is read.
        """

        VERSION = tfds.core.Version("3.0.1")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(names=LABELS),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            found = files(dl_manager, pathlib.Path(self._data_dir_root) / "downloads" / "manual" / "fashion_mnist")
            return {split: self._generate_examples(*found[split]) for split in FILES}

        def _generate_examples(self, images: pathlib.Path, labels: pathlib.Path) -> Iterator[tuple[int, Any]]:
            pixels, classes = read_idx(images), read_idx(labels)
            if pixels.shape != (len(classes), 28, 28):
                raise UserError(f"'{images}' holds an array {pixels.shape}, '{labels}' one {classes.shape}")
            for i, (image, label) in enumerate(zip(pixels, classes)):
                yield i, {"image": PIL.Image.fromarray(image), "label": int(label)}


def files(dl_manager: Any, manual: pathlib.Path) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """Return split -> (file of images, file of labels)."""
    if manual.is_dir():
        return _found(manual)
    try:
        return _found(assets.resolve(PACKAGE))
    except UserError as error:
        logging.info("fashion_mnist is not in a package registry here (%s); downloading it", error)
    names = {name: mnist.FashionMNIST.URL + name for pair in _names().values() for name in pair}
    try:
        paths = {name: pathlib.Path(path) for name, path in dl_manager.download(names).items()}
    except OSError as error:  # requests' too
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"fashion_mnist cannot be downloaded ({reason}); put its four files into '{manual}'") from None
    return {split: (paths[images], paths[labels]) for split, (images, labels) in _names().items()}


def _names() -> dict[str, tuple[str, str]]:
    return {split: (f"{start}-images-idx3-ubyte.gz", f"{start}-labels-idx1-ubyte.gz") for split, start in FILES.items()}


def _found(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """Return the files in a folder, compressed or not; raise UserError, which names it, where one is missing."""
    found = {}
    for split, names in _names().items():
        images, labels = (_present(folder / name) for name in names)
        found[split] = (images, labels)
    return found


def _present(path: pathlib.Path) -> pathlib.Path:
    for candidate in (path, path.with_suffix("")):
        if candidate.is_file():
            return candidate
    raise UserError(f"'{path.parent}' has no {path.name}")


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Return the array of unsigned bytes in an idx file, compressed or not; raise UserError where it holds none."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:  # of a copy or a download that was cut off, say
            raise UserError(f"'{path}' cannot be decompressed: {error}") from None
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if not dimensions or len(content) != 4 + 4 * dimensions + np.prod(shape):
        raise UserError(f"'{path}' is no idx file of unsigned bytes, or not a whole one")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
