"""Any folder of images by class: PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg beside PATH/validation and PATH/test."""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from research.data import image, image_files, rows
from research.errors import UserError, nearest

SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
BROKEN = ("error", "skip")
AT_ONCE = 1024  # files that wait for a thread
SHOWN = 10  # files in a warning


class File(NamedTuple):
    """An image, its class, and what it is called: its path below the folder."""

    path: pathlib.Path
    label: str
    name: str


# eq=False, as TFDS compares configs by identity.
@dataclasses.dataclass(eq=False, kw_only=True)
class ImageFolderConfig(tfds.core.BuilderConfig):
    """Which images are meant; `name` is a hash of the settings and of the files' names, sizes and times.

    Attributes:
      folder: where they are.
      labels: the class names in order; empty for the training folders' names, sorted.
      held_out: the share of the training images that becomes the split "validation". Chosen by a hash of the content,
        so that equal files stay together and the choice survives new names.
      broken: whether images that cannot be decoded are an "error", or left out with a warning: "skip".
      files: split -> its images, in the order of their names.
    """

    folder: pathlib.Path
    labels: tuple[str, ...] = ()
    held_out: float = 0.0
    broken: str = "error"
    files: dict[str, list[File]] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the settings, find the files and name all that, so that what has changed is prepared anew."""
        if self.broken not in BROKEN:
            raise UserError(f"broken: no '{self.broken}'{nearest(self.broken, BROKEN)}")
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels: one is there twice: {self.labels}")
        self.files = find(self.folder)
        rows.check_held_out(self.held_out, self.files)
        stats = {split: [[*file[1:], *_stat(file.path)] for file in some] for split, some in self.files.items()}
        identity = json.dumps([self.labels, self.held_out, self.broken, stats], sort_keys=True)
        self.name = hashlib.sha256(identity.encode()).hexdigest()[:16]


with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class ImageFolder(tfds.core.GeneratorBasedBuilder):
        """The user's own images. Features: `image` (the file's bytes), `file_name` (below the folder), `label`."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            # Label names are set by _split_generators, and afterwards come from the prepared files.
            features = {
                "image": tfds.features.Image(),
                "file_name": tfds.features.Text(),
                "label": tfds.features.ClassLabel(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # the files are here
            splits, self.info.features["label"].names = load(self.builder_config)
            return {split: self._generate_examples(files) for split, files in splits.items()}

        def _generate_examples(self, files: Sequence[File]) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, file in enumerate(files):
                yield position, {"image": file.path.read_bytes(), "file_name": file.name, "label": file.label}


def find(folder: pathlib.Path) -> dict[str, list[File]]:
    """Return split -> images, those of a folder of classes as "train"; the files are not read.

    Raises:
      UserError: these are no folders of images by class.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder")
    below = _folders(folder)
    if not any(place.name in SPLITS and _folders(place) for place in below):
        return {"train": _by_class(folder, folder)}
    found: dict[str, list[File]] = {}
    for place in below:
        if place.name not in SPLITS:
            raise UserError(f"'{place}' stands beside folders of splits and is none{nearest(place.name, SPLITS)}")
        if SPLITS[place.name] in found:
            raise UserError(f"'{folder}' has both 'val' and 'validation'")
        found[SPLITS[place.name]] = _by_class(place, folder)
    if "train" not in found:
        raise UserError(f"'{folder}' has {', '.join(place.name for place in below)}, but no 'train'")
    return found


def load(config: ImageFolderConfig) -> tuple[dict[str, list[File]], list[str]]:
    """Decode every image once.

    Returns:
      Split -> the images that are whole; the label names.

    Raises:
      UserError: broken images, all named in one line, or classes that do not go together.
    """
    labels = _labels(config)
    _warn_of_others(config)
    files = [file for some in config.files.values() for file in some]
    checked = dict(zip(files, _check(files)))
    broken = [wrong for _, wrong in checked.values() if wrong]
    if broken:
        listed = f"{len(broken)} of {len(files)} images in '{config.folder}' are broken: {'; '.join(broken)}"
        if config.broken == "error":
            raise UserError(f"{listed}; broken='skip' leaves them out")
        logging.warning("left out: %s", listed)
    splits = {split: [file for file in some if not checked[file][1]] for split, some in config.files.items()}
    for split, some in splits.items():
        if not some:
            raise UserError(f"'{config.folder}' holds no whole image for '{split}'")
    if config.held_out:
        hashes = [checked[file][0] for file in splits["train"]]
        splits["train"], splits["validation"] = rows.hold_out(splits["train"], hashes, config.held_out)
    return splits, labels


def _labels(config: ImageFolderConfig) -> list[str]:
    """Return the class names in order; all images have one of them."""
    known = list(config.labels) or _sorted({file.label for file in config.files["train"]})
    if len(known) < 2:
        raise UserError(f"'{config.folder}' holds the one class '{known[0]}' only")
    for file in (file for some in config.files.values() for file in some):
        if file.label not in known:
            where = "labels" if config.labels else "the training folder's classes"
            raise UserError(f"'{file.path}': '{file.label}' is not in {where}{nearest(file.label, known)}")
    return known


def _sorted(names: set[str]) -> list[str]:
    """Return names in order: as numbers if all of them are whole numbers."""
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _by_class(place: pathlib.Path, folder: pathlib.Path) -> list[File]:
    """Return the images in the folders of classes at `place`."""
    found: list[File] = []
    for inner in _folders(place):
        paths, _ = image_files.find(inner)
        if not paths:
            raise UserError(f"'{inner}' holds no image, a file that ends in {', '.join(image_files.SUFFIXES)}")
        found += [File(path, inner.name, path.relative_to(folder).as_posix()) for path in paths]
    if not found:
        raise UserError(f"'{place}' has no folders of images; it needs one for each class")
    return found


def _folders(place: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not image_files.is_hidden(path.name))


def _stat(path: pathlib.Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:  # a link that leads nowhere
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _warn_of_others(config: ImageFolderConfig) -> None:
    """Name the files that are no images of a class, by their names and places."""
    read = {file.path for some in config.files.values() for file in some}
    others = [str(path) for some in image_files.find(config.folder) for path in some if path not in read]
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        logging.warning("not read, as they are no images of a class: %s%s", ", ".join(others[:SHOWN]), more)


def _check(files: Sequence[File]) -> Iterator[tuple[str, str]]:
    """Yield for each file a hash of its content and what is wrong with its image, if anything is."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(files), AT_ONCE):
            yield from pool.map(_check_one, files[start : start + AT_ONCE])


def _check_one(file: File) -> tuple[str, str]:
    try:
        content = file.path.read_bytes()
        image.decode(content, 3, file.name)
    except OSError as error:
        return "", f"'{file.name}' cannot be read: {error.strerror}"
    except UserError as error:
        return "", str(error)
    return hashlib.sha256(content).hexdigest(), ""
