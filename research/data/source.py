"""Random access to examples: named datasets, the user's own tables and images, and records in a config."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import pathlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import tensorflow_datasets
from absl import logging
from tensorflow_datasets.core import decode, features, naming, read_only_builder
from tensorflow_datasets.core.dataset_builder import DatasetBuilder
from tensorflow_datasets.core.download import downloader

from research import assets
from research.data import datasets
from research.data.datasets import coco_folder as coco_folders
from research.data.datasets import image_folder as image_folders
from research.data.datasets import table as tables
from research.data.mixture import Joined, Weights, make_mixture
from research.errors import UserError, nearest

FROM_FILES = ("table", "image_folder", "coco_folder")


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples by position; safe to share between threads and to pickle.

    Attributes:
      records: the examples as they are stored.
      label_names: {feature: class names, in the order of their ids}.
      texts: the text features, as a tree: {feature: True, or the subtree}.
      multi_hot: features that are lists of class ids, returned as multi-hot float32 [classes].
    """

    records: Sequence[Mapping[str, Any]]
    label_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    multi_hot: tuple[str, ...] = ()

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example: text as str, images as encoded bytes, the rest as numbers and numpy arrays."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: there are {len(self)} examples")
        example = _decode(dict(self.records[index]), self.texts)
        for name in self.multi_hot:
            row = np.zeros(len(self.label_names[name]), np.float32)
            row[np.asarray(example[name], int)] = 1
            example[name] = row
        return example


def examples(records: Sequence[Mapping[str, Any]], label_names: Mapping[str, Sequence[str]] | None = None) -> Source:
    """Return a source of records in memory; `label_names` is {feature: class names}."""
    return Source([dict(record) for record in records], {k: tuple(names) for k, names in (label_names or {}).items()})


def tfds(dataset: str, split: str = "train", data_dir: str | None = None) -> Source:
    """Return a split of a named dataset, preparing it first if needed.

    Args:
      dataset: one of the modules of `research.data.datasets`, or any dataset of TFDS; "name/config" selects a
        config, by default the first: "glue/sst2", "libreoffice/en-fr".
      split: in TFDS notation: "train", "train[:90%]", "train[10%:]+validation".
      data_dir: the folder of prepared datasets; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
      UserError: the dataset or split does not exist, or cannot be prepared.
    """
    if dataset.partition("/")[0] in _own_names():
        return _source(lambda: _own_builder(dataset, _data_dir(data_dir)), dataset, split)
    return _source(lambda: _stock_builder(dataset, _data_dir(data_dir)), dataset, split)


def table(
    train: str,
    label: str,
    text: str | Sequence[str] = "text",
    validation: str | None = None,
    test: str | None = None,
    split: str = "train",
    kind: str = "classification",
    labels: Sequence[str] = (),
    separator: str = ",",
    columns: Sequence[str] = (),
    quoted: bool | None = None,
    held_out: float = 0.0,
    data_dir: str | None = None,
) -> Source:
    """Return a split of the user's own CSV, TSV, JSON-lines or Parquet files.

    The arguments are those of `datasets.table.TableConfig`; `train`, `validation` and `test` are files, as
    `assets.resolve` takes them, all read and checked. The features: `text`, `text_pair`, `label`, `id` (the line).

    Raises:
      UserError: a missing column, bad rows (with file and line), or conflicting settings.
    """
    files = {"train": train, "validation": validation, "test": test}
    config = tables.TableConfig(
        name="",  # becomes a hash of the settings and the files' contents
        files={name: assets.resolve(path) for name, path in files.items() if path},
        text=(text,) if isinstance(text, str) else tuple(text),
        label=label,
        kind=kind,
        labels=tuple(str(name) for name in labels),
        separator=separator,
        columns=tuple(columns),
        quoted=quoted,
        held_out=held_out,
    )

    def make() -> DatasetBuilder:
        with _quietly():
            return tables.Table(config=config, data_dir=_data_dir(data_dir))

    return _source(make, train, split)


def image_folder(
    path: str,
    split: str = "train",
    held_out: float = 0.0,
    labels: Sequence[str] = (),
    broken: str = "error",
    data_dir: str | None = None,
) -> Source:
    """Return a split of the user's own images, one folder per class.

    The files are copied unchanged into the prepared dataset; each is decoded once to validate it. The features are
    `image` (the file's bytes), `label`, and `file_name`, the path below the folder.

    Args:
      path: holds [train/]CLASS/*.jpg, optionally validation/CLASS/*.jpg and test/CLASS/*.jpg; anything that
        `assets.resolve` takes. Images end in one of `image_files.SUFFIXES`, and may be nested deeper.
      split: "train", "validation" or "test", or a slice in TFDS notation.
      held_out: the fraction of training images held out as "validation", chosen by a hash of the content.
      labels: the class names in order; by default the sorted names of the training folders.
      broken: "error": undecodable images raise an error that lists them; "skip": they are dropped with a warning.
      data_dir: the folder of prepared datasets; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
      UserError: the folder has no images by class, images are broken, or settings conflict.
    """
    config = image_folders.ImageFolderConfig(
        name="",  # becomes a hash of the settings and of the files' names, sizes and times
        folder=assets.resolve(path),
        labels=tuple(labels),
        held_out=held_out,
        broken=broken,
    )

    def make() -> DatasetBuilder:
        with _quietly():
            return image_folders.ImageFolder(config=config, data_dir=_data_dir(data_dir))

    return _source(make, path, split)


def coco_folder(
    images: str,
    annotations: str,
    split: str = "train",
    validation_images: str | None = None,
    validation_annotations: str | None = None,
    test_images: str | None = None,
    test_annotations: str | None = None,
    held_out: float = 0.0,
    broken: str = "error",
    data_dir: str | None = None,
) -> Source:
    """Return a split of the user's own images with boxes, annotated in COCO's format.

    The files are copied as they are into the prepared dataset, and each is decoded once to validate it. The
    features are those of TFDS's coco: `image` (the file's bytes), `image/filename`, `image/id`, and `objects`: `bbox`
    (top, left, bottom, right as shares of the image, clipped to it), `label`, `is_crowd`, `area`, `id`; and
    `category_id`, as in the annotations. Classes are numbered by ascending category ids, from 0.

    Args:
      images: the folder of training images, in which the annotations' file names are found; anything that
        `assets.resolve` takes, as the other files.
      annotations: a JSON file with "images", "annotations" and "categories".
      split: "train", "validation" or "test", or a slice in TFDS notation.
      validation_images: a folder for "validation"; by default `images`.
      validation_annotations: a file for "validation".
      test_images: a folder for "test"; by default `images`.
      test_annotations: a file for "test".
      held_out: the fraction of training images held out as "validation", chosen by a hash of the content.
      broken: images that cannot be decoded, or are of another size than annotated, and boxes that cannot be right are
        an "error" that lists them; "skip" drops them with a warning.
      data_dir: the folder of prepared datasets; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
      UserError: the files are not in COCO's format, an image or box is broken, or settings conflict.
    """
    pairs = {
        "train": (images, annotations),
        "validation": (validation_images, validation_annotations),
        "test": (test_images, test_annotations),
    }
    for name, (folder, file) in pairs.items():
        if folder and not file:
            raise UserError(f"{name}_images needs {name}_annotations; set both")
    config = coco_folders.CocoFolderConfig(
        name="",  # becomes a hash of the settings, the annotations, and the images' sizes and times
        files={
            name: (assets.resolve(folder or images), assets.resolve(file))
            for name, (folder, file) in pairs.items()
            if file
        },
        held_out=held_out,
        broken=broken,
    )

    def make() -> DatasetBuilder:
        with _quietly():
            return coco_folders.CocoFolder(config=config, data_dir=_data_dir(data_dir))

    return _source(make, annotations, split)


def mixture(sources: Mapping[str, Any], weights: Weights = (), seed: int = 0, examples_per_step: float = 0.0) -> Joined:
    """Return several sources as one; see research/data/mixture.py for the order.

    Args:
      sources: {name: source}, all with the same features.
      weights: {name: weight}: the shares that the sources have of the examples, in any unit; each source is shuffled
        anew whenever it has been seen whole. Shares that change are [{"from_step": 0, "weights": {...}}, ...], to
        which a resumed run may add phases from its step on. Without weights each example comes once, as an
        evaluation needs it.
      seed: of the order of each source.
      examples_per_step: what a step takes of the mixture, to place `from_step`: the batch size, or, where rows are
        packed, train/source_examples of metrics.jsonl divided by the step.

    Raises:
      UserError: unknown names, weights not above 0, or sources of different features.
    """
    return make_mixture(sources, weights, seed, examples_per_step)


def _data_dir(data_dir: str | None) -> str:
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in folder:
        raise UserError(f"data_dir: '{folder}' is no local folder, and records are read at random, as from a disk only")
    return os.path.expanduser(folder)


def _source(make: Callable[[], DatasetBuilder], name: str, split: str) -> Source:
    """Open a split of the dataset that the builder returned by `make` describes."""
    builder = _made(make)
    if not builder.data_path.exists():
        _prepare(builder, name)
        builder = _made(make)  # reads what this or another process has prepared
    try:
        records = builder.as_data_source(split, decoders=_encoded_images(builder.info.features))
    except NotImplementedError:
        raise UserError(
            f"'{name}' is prepared in '{builder.data_path}' in a format without random access; "
            f"{_elsewhere(name, builder)}"
        ) from None
    except ValueError as error:
        asked = re.match(r"\w*", split.strip())
        if asked and asked[0] in builder.info.splits:
            raise UserError(
                f"split: '{split}' is not a valid split; write 'train', 'train[:90%]' or 'train+test'"
            ) from error
        hint = nearest(asked[0] if asked else "", builder.info.splits)
        raise UserError(f"'{name}' has no split '{split}'{hint}") from error
    return Source(
        records,
        _label_names(builder.info.features),
        _text_tree(builder.info.features) or {},
        getattr(builder, "multi_hot", ()),
    )


def _made(make: Callable[[], DatasetBuilder]) -> DatasetBuilder:
    """Return a builder that does not look for metadata in TFDS's bucket, which leaves a temporary folder each time."""
    with mock.patch.object(tensorflow_datasets.core.DatasetInfo, "initialize_from_bucket"):
        return make()


def _prepare(builder: DatasetBuilder, name: str) -> None:
    """Prepare a dataset.

    TFDS writes to a temporary folder and renames it, so of several concurrent processes one wins and the others find
    a complete dataset.
    """
    own = type(builder).__module__.startswith(datasets.__name__)
    logging.info("preparing %s in %s", name, builder.data_path)
    try:
        # TFDS retries ten times with doubling delays: minutes without a network.
        with _quietly() if own else contextlib.nullcontext(), mock.patch.object(downloader, "MAX_RETRIES", 3):
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except Exception as error:
        if builder.data_path.exists():
            return
        if own:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"cannot prepare '{name}' on this machine ({reason}); {_elsewhere(name, builder)}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress TFDS's progress bars and its warnings about configs that it does not know."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tensorflow_datasets.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tensorflow_datasets.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _elsewhere(name: str, builder: DatasetBuilder) -> str:
    root = pathlib.Path(builder.data_path)
    return (
        "on a machine with a network and TensorFlow, run "
        f"`tfds build {name} --file_format=array_record` and copy the result to '{root}'"
    )


def _own_names() -> list[str]:
    """Return the datasets of this project that need no files of the user."""
    return [module.name for module in pkgutil.iter_modules(datasets.__path__) if module.name not in FROM_FILES]


def _own_builder(name: str, data_dir: str) -> DatasetBuilder:
    base, _, config = name.partition("/")
    module = importlib.import_module(f"{datasets.__name__}.{base}")
    classes: list[Any] = [value for value in vars(module).values() if inspect.isclass(value)]
    (cls,) = (value for value in classes if issubclass(value, DatasetBuilder) and value.__module__ == module.__name__)
    if config and config not in cls.builder_configs:
        raise UserError(f"dataset '{base}' has no config '{config}'{nearest(config, cls.builder_configs)}")
    return cls(config=config or None, data_dir=data_dir)


def _stock_builder(name: str, data_dir: str) -> DatasetBuilder:
    base, _, config = name.partition("/")
    listed = tensorflow_datasets.list_builders(with_community_datasets=False)
    reason = "" if base in listed else _import_stock(base)
    try:
        return tensorflow_datasets.builder(name, data_dir=data_dir)
    except ImportError as error:
        with contextlib.suppress(tensorflow_datasets.core.DatasetNotFoundError):
            return read_only_builder.builder_from_files(name, data_dir=data_dir)  # needs no code of its builder
        raise UserError(f"dataset '{name}' cannot be opened here: {_cause(error)}") from error
    except tensorflow_datasets.core.DatasetNotFoundError:
        if reason:
            raise UserError(f"dataset '{name}' cannot be opened here: {reason}") from None
        known = [*_own_names(), *listed, *_stock_modules()]
        raise UserError(f"unknown dataset '{name}'{nearest(base, known)}") from None
    except ValueError as error:
        configs = tensorflow_datasets.builder_cls(base).builder_configs
        if config.partition(":")[0] in configs or not configs:
            raise UserError(f"dataset '{name}': {' '.join(str(error).split())[:300]}") from error
        raise UserError(f"dataset '{base}' has no config '{config}'{nearest(config, configs)}") from None


def _import_stock(name: str) -> str:
    """Import the module of a TFDS dataset; return the reason if that fails, else "".

    TFDS imports whole packages, which fails at the first module that needs TensorFlow; most modules do not.
    """
    module = _stock_modules().get(name)
    try:
        if module:
            importlib.import_module(module)
    except ImportError as error:
        return _cause(error)
    return ""


def _cause(error: ImportError) -> str:
    """Return the missing module's message, without the advice that TFDS adds."""
    found = re.search(r"No module named '[\w.]+'", str(error))
    return found[0] if found else " ".join(str(error).split())[:200]


def _stock_modules() -> dict[str, str]:
    """Return {dataset: module} for the TFDS datasets defined in its topical packages."""
    root = pathlib.Path(tensorflow_datasets.__file__).parent
    found = {}
    for path in sorted(root.glob("*/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in ("core", "scripts", "testing", "datasets") or parts[-1].endswith("_test"):
            continue
        for match in re.finditer(r"^class (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[naming.camelcase_to_snakecase(match[1])] = ".".join([root.name, *parts])
    return found


def _label_names(tree: features.FeaturesDict) -> dict[str, tuple[str, ...]]:
    """Return the class names of each feature; those of nested objects only where the example has none."""
    names: dict[str, tuple[str, ...]] = {}
    for name, feature in tree.items():
        inner = feature.feature if isinstance(feature, features.Sequence) else feature
        if isinstance(inner, features.FeaturesDict):
            names = _label_names(inner) | names
        if isinstance(inner, features.ClassLabel) and inner.num_classes is not None:
            names[name] = tuple(inner.names)
    return names


def _encoded_images(tree: features.FeaturesDict) -> dict[str, decode.Decoder] | None:
    """Return decoders that leave images encoded; `image.Decode` decodes them at the size needed."""
    images = [name for name, feature in tree.items() if isinstance(feature, features.Image)]
    return {name: decode.SkipDecoding() for name in images} or None


def _text_tree(feature: features.FeatureConnector) -> Any:
    """Return the text features below a feature: True, a dict of those that contain text, or None."""
    if isinstance(feature, features.Text):
        return True
    if isinstance(feature, features.Sequence):
        return _text_tree(feature.feature)
    if isinstance(feature, features.FeaturesDict):
        below = {name: _text_tree(inner) for name, inner in feature.items()}
        return {name: tree for name, tree in below.items() if tree} or None
    return None


def _decode(value: Any, tree: Any) -> Any:
    """Decode the bytes of text features to str, and sequences of text to lists."""
    if not tree:
        return value
    if isinstance(value, dict):
        return value | {name: _decode(value[name], below) for name, below in tree.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list | np.ndarray) and np.ndim(value):
        return [_decode(item, tree) for item in value]
    return str(value)
