"""Any folder of images with a file of annotations in COCO's format (Lin 2014)."""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from research.data import image, image_files, rows
from research.errors import UserError, nearest

BROKEN = ("error", "skip")
AT_ONCE = 1024  # files that wait for a thread
SHOWN = 10  # mistakes that a message names

Problems = list[str]


class Picture(NamedTuple):
    """An image of a file of annotations.

    Attributes:
      path: its file.
      name: its file_name.
      id: its number.
      size: (height, width) as the annotations have it; None where they do not say.
      objects: what is in it, boxes as (x, y, width, height) in pixels.
    """

    path: pathlib.Path
    name: str
    id: int
    size: tuple[int, int] | None
    objects: list[dict[str, Any]]


class Checked(NamedTuple):
    """What is known of an image that was decoded: a hash of its content, its (height, width), or what is wrong."""

    digest: str
    size: tuple[int, int]
    wrong: str


# eq=False, as TFDS compares configs by identity.
@dataclasses.dataclass(eq=False, kw_only=True)
class CocoFolderConfig(tfds.core.BuilderConfig):
    """Which images are meant; `name` is a hash of the settings, the annotations, and the images' sizes and times.

    Attributes:
      files: split -> (folder of images, file of annotations).
      held_out: the share of the training images that becomes the split "validation". Chosen by a hash of the content,
        so that equal files stay together and the choice survives new names.
      broken: whether images that cannot be decoded and boxes that cannot be right are an "error", or left out with a
        warning: "skip".
    """

    files: dict[str, tuple[pathlib.Path, pathlib.Path]]
    held_out: float = 0.0
    broken: str = "error"

    def __post_init__(self) -> None:
        """Check the settings and name them with the files, so that what has changed is prepared anew."""
        if self.broken not in BROKEN:
            raise UserError(f"broken: no '{self.broken}'{nearest(self.broken, BROKEN)}")
        rows.check_held_out(self.held_out, self.files)
        files = {split: _identity(*pair) for split, pair in self.files.items()}
        identity = json.dumps([self.held_out, self.broken, files], sort_keys=True)
        self.name = hashlib.sha256(identity.encode()).hexdigest()[:16]


with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class CocoFolder(tfds.core.GeneratorBasedBuilder):
        """The user's own images with boxes. The features are those of TFDS's coco, and `category_id`.

        `image` (the file's bytes), `image/filename`, `image/id`, and `objects`: `bbox` (top, left, bottom, right as
        shares), `label` (0 for the least category id), `category_id` (as in the annotations), `is_crowd`, `area` in
        pixels, `id`.
        """

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            # Label names are set by _split_generators, and afterwards come from the prepared files.
            features = {
                "image": tfds.features.Image(),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "objects": tfds.features.Sequence(
                    {
                        "id": np.int64,
                        "area": np.float32,
                        "bbox": tfds.features.BBoxFeature(),
                        "label": tfds.features.ClassLabel(),
                        "category_id": np.int64,
                        "is_crowd": np.bool_,
                    }
                ),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # the files are here
            splits, names = load(self.builder_config)
            self.info.features["objects"].feature["label"].names = list(names.values())
            numbers = {category: number for number, category in enumerate(names)}
            return {split: self._generate_examples(pictures, numbers) for split, pictures in splits.items()}

        def _generate_examples(
            self, pictures: Sequence[Picture], numbers: Mapping[int, int]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, picture in enumerate(pictures):
                yield (
                    position,
                    {
                        "image": picture.path.read_bytes(),
                        "image/filename": picture.name,
                        "image/id": picture.id,
                        "objects": [_feature(found, picture.size, numbers) for found in picture.objects],
                    },
                )


def load(config: CocoFolderConfig) -> tuple[dict[str, list[Picture]], dict[int, str]]:
    """Read all annotations and decode every image once.

    Returns:
      Split -> the images that are whole, with the boxes that can be right; category id -> name, by ascending ids.

    Raises:
      UserError: files that are not in COCO's format, broken images or boxes, the first ten named in one line, or splits
        whose categories differ.
    """
    problems: Problems = []
    splits, categories = {}, {}
    for split, (folder, annotations) in config.files.items():
        content = _read(annotations)
        categories[split] = _categories(content, annotations)
        splits[split] = _pictures(content, folder, annotations.name, categories[split], problems)
    names = categories["train"]
    for split, others in categories.items():
        _agree(names, others, config.files[split][1])
    checked = {split: list(_check(pictures)) for split, pictures in splits.items()}
    hashes = {}
    for split, pictures in splits.items():
        kept = [(picture, seen) for picture, seen in zip(pictures, checked[split]) if not seen.wrong]
        problems += [seen.wrong for seen in checked[split] if seen.wrong]
        splits[split] = [_within(picture._replace(size=seen.size), problems) for picture, seen in kept]
        hashes[split] = [seen.digest for _, seen in kept]
    _refuse(problems, config.broken)
    for split, pictures in splits.items():
        if not pictures:
            raise UserError(f"'{config.files[split][1]}' names no whole image")
    if config.held_out:
        splits["train"], splits["validation"] = rows.hold_out(splits["train"], hashes["train"], config.held_out)
    return splits, names


def _identity(folder: pathlib.Path, annotations: pathlib.Path) -> list[Any]:
    """Return what changes when the files do."""
    if not folder.is_dir():
        raise UserError(f"images: '{folder}' is no folder")
    if not annotations.is_file():
        raise UserError(f"annotations: '{annotations}' is no file")
    with annotations.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stats = [(path, path.stat()) for path in image_files.find(folder)[0] if path.exists()]
    files = [[path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return [digest, hashlib.sha256(json.dumps(files).encode()).hexdigest()]


def _read(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lists of a file of annotations."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is not in COCO's format: it is no object of lists")
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(
                f"'{path}' is not in COCO's format: it has no list of objects '{key}'{nearest(key, content)}"
            )
    return content


def _categories(content: Mapping[str, list[dict[str, Any]]], path: pathlib.Path) -> dict[int, str]:
    """Return id -> name, by ascending ids; categories of the same name are told apart by their ids."""
    found: dict[int, str] = {}
    for entry in content["categories"]:
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or not isinstance(name, str) or number in found:
            raise UserError(f"'{path}': {entry} is no category with an id of its own and a name")
        found[number] = name
    if not found:
        raise UserError(f"'{path}' has no categories")
    names = list(found.values())
    return {i: f"{name} ({i})" if names.count(name) > 1 else name for i, name in sorted(found.items())}


def _agree(names: Mapping[int, str], others: Mapping[int, str], path: pathlib.Path) -> None:
    """Raise a UserError where a file of annotations has other categories than the training file."""
    for number, name in others.items():
        if names.get(number) != name:
            there = f"'{names[number]}'" if number in names else "none"
            raise UserError(f"'{path}': category {number} is '{name}', in the training file it is {there}")


def _pictures(
    content: Mapping[str, list[dict[str, Any]]],
    folder: pathlib.Path,
    file: str,
    categories: Mapping[int, str],
    problems: Problems,
) -> list[Picture]:
    """Return the images in the order of the file, each with its objects; what cannot be used goes to `problems`."""
    found: dict[Any, Picture] = {}
    for position, entry in enumerate(content["images"]):
        number, name = entry.get("id"), entry.get("file_name")
        if number is not None and type(number) is not int:
            problems.append(f"{file}: image {position} has the id {number!r}, where COCO's format has an integer")
            continue
        if number is None or not isinstance(name, str) or number in found:
            problems.append(f"{file}: image {position} has no id of its own and file_name")
            continue
        size = (entry["height"], entry["width"]) if {"height", "width"} <= set(entry) else None
        found[number] = Picture(folder / name, name, number, size, [])
    for position, entry in enumerate(content["annotations"]):
        entry = {"id": position, "iscrowd": 0} | entry
        picture = found.get(entry.get("image_id"))
        if wrong := _wrong(entry, picture, categories):
            problems.append(f"{file}: annotation {entry['id']}{wrong}")
        elif picture:
            picture.objects.append(entry)
    return list(found.values())


def _wrong(entry: Mapping[str, Any], picture: Picture | None, categories: Mapping[int, str]) -> str:
    """Return what is wrong with an annotation, if anything is."""
    if picture is None:
        return f" is of image {entry.get('image_id')}, which is not there"
    of = f" of '{picture.name}'"
    if type(entry["id"]) is not int:
        return f"{of} has an id that is no integer"
    if entry.get("category_id") not in categories:
        return f"{of} is of category {entry.get('category_id')}, which is not there"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) for x in box):
        return f"{of} has the box {box}, not [x, y, width, height]"
    if not np.isfinite(box).all() or min(box[2:]) <= 0:
        return f"{of} has the box {box}, which has no area"
    return ""


def _within(picture: Picture, problems: Problems) -> Picture:
    """Return an image whose size is known, without boxes that lie outside of it."""
    assert picture.size is not None
    height, width = picture.size
    inside = []
    for found in picture.objects:
        x, y, w, h = found["bbox"]
        if x < width and y < height and x + w > 0 and y + h > 0:
            inside.append(found)
        else:
            where = f"annotation {found['id']} of '{picture.name}' has the box {found['bbox']}"
            problems.append(f"{where}, outside of its {width} x {height} pixels")
    return picture._replace(objects=inside)


def _refuse(problems: Problems, broken: str) -> None:
    """Raise a UserError that names what is wrong, or warns of it."""
    if not problems:
        return
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    listed = f"{'; '.join(problems[:SHOWN])}{more}"
    if broken == "error":
        plural = "s" if len(problems) > 1 else ""
        raise UserError(f"{len(problems)} mistake{plural}: {listed}; broken='skip' leaves them out")
    logging.warning("left out: %s", listed)


def _check(pictures: Sequence[Picture]) -> Iterator[Checked]:
    """Decode every image once."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(pictures), AT_ONCE):
            yield from pool.map(_check_one, pictures[start : start + AT_ONCE])


def _check_one(picture: Picture) -> Checked:
    try:
        content = picture.path.read_bytes()
        height, width = image.decode(content, 3, picture.name).shape[:2]
    except OSError as error:
        return Checked("", (0, 0), f"'{picture.path}' cannot be read: {error.strerror}")
    except UserError as error:
        return Checked("", (0, 0), str(error))
    if picture.size not in (None, (height, width)):
        stated = f"{picture.size[1]} x {picture.size[0]}" if picture.size else ""
        return Checked("", (0, 0), f"'{picture.name}' has {width} x {height} pixels (upright), annotated were {stated}")
    return Checked(hashlib.sha256(content).hexdigest(), (height, width), "")


def _feature(found: Mapping[str, Any], size: tuple[int, int] | None, numbers: Mapping[int, int]) -> dict[str, Any]:
    """Return an object as it is stored, its box clipped to the image."""
    assert size is not None
    height, width = size
    x, y, w, h = found["bbox"]
    area = found.get("area")
    edges = np.clip([y / height, x / width, (y + h) / height, (x + w) / width], 0, 1)
    return {
        "id": found["id"],
        "area": area if type(area) in (int, float) else w * h,
        "bbox": tfds.features.BBox(*(float(edge) for edge in edges)),
        "label": numbers[found["category_id"]],
        "category_id": found["category_id"],
        "is_crowd": bool(found["iscrowd"]),
    }
