"""Any CSV, TSV, JSON-lines or Parquet file with a text column, or two, and a label column."""

import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from research.data import rows
from research.errors import UserError, nearest

KINDS = ("classification", "multi_label", "regression")


# eq=False, as TFDS compares configs by identity.
@dataclasses.dataclass(eq=False, kw_only=True)
class TableConfig(tfds.core.BuilderConfig):
    """What a table's files and columns mean; `name` is a hash of all of it and of the files' contents.

    Attributes:
      files: split -> file.
      text: one column of text, or two for pairs.
      label: the column of labels.
      kind: "classification" (strings or integers), "multi_label" (a list in JSON lines and Parquet, else names
        parted by `separator`; an empty one means that no label applies) or "regression" (numbers).
      labels: the label names in order; empty for those of the training file, sorted.
      separator: between the labels of a row, in CSV and TSV.
      columns: the names of the columns of CSV and TSV files without a header.
      quoted: whether `"` quotes fields; None for yes in CSV and no in TSV.
      held_out: the share of the training rows that becomes the split "validation". Chosen by a hash of the
        text, so that equal texts stay together and the choice survives a new order of the rows.
    """

    files: dict[str, pathlib.Path]
    text: tuple[str, ...]
    label: str
    kind: str
    labels: tuple[str, ...] = ()
    separator: str = ","
    columns: tuple[str, ...] = ()
    quoted: bool | None = None
    held_out: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings and name them, so that an edited file is never served from the cache."""
        if self.kind not in KINDS:
            raise UserError(f"kind: no '{self.kind}'{nearest(self.kind, KINDS)}")
        if len(self.text) not in (1, 2):
            raise UserError(f"text: one column or two, not {self.text}")
        rows.check_held_out(self.held_out, self.files)
        if self.labels and self.kind == "regression":
            raise UserError("labels: numbers have no label names; leave them out or choose another kind")
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels: one is there twice: {self.labels}")
        for path in self.files.values():
            rows.check_suffix(path)
        settings = {k: v for k, v in vars(self).items() if k not in ("files", "name")}
        files = {split: [path.suffix, _sha256(path)] for split, path in self.files.items()}
        identity = json.dumps([settings, files], sort_keys=True, default=str)
        self.name = hashlib.sha256(identity.encode()).hexdigest()[:16]


with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class Table(tfds.core.GeneratorBasedBuilder):
        """The user's own table. Features: `id` (its line), `text`, `text_pair` for pairs, `label`."""

        VERSION = tfds.core.Version("1.0.0")

        @property
        def multi_hot(self) -> tuple[str, ...]:
            """The features that are sets of classes."""
            return ("label",) if self.builder_config.kind == "multi_label" else ()

        def _info(self) -> tfds.core.DatasetInfo:
            # Label names are set by _split_generators, and afterwards come from the prepared files.
            label = {
                "classification": tfds.features.ClassLabel,
                "multi_label": lambda: tfds.features.Sequence(tfds.features.ClassLabel()),
                "regression": lambda: tfds.features.Scalar(np.float32),
            }[self.builder_config.kind]()
            texts = {name: tfds.features.Text() for name in _text_features(self.builder_config)}
            features = {"id": tfds.features.Scalar(np.int64), **texts, "label": label}
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # the files are here
            splits, labels = load(self.builder_config)
            label = self.info.features["label"]
            if self.builder_config.kind == "classification":
                label.names = labels
            elif self.builder_config.kind == "multi_label":
                label.feature.names = labels
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples: Sequence[rows.Row]) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, (line, example) in enumerate(examples):
                yield position, {"id": line, **example}


def load(config: TableConfig) -> tuple[dict[str, list[rows.Row]], list[str]]:
    """Read a table's files.

    Returns:
      Split -> rows of `text`, `text_pair` and `label` (a name, a list of names, or a number); the label names.

    Raises:
      UserError: bad rows, all named in one line, or a column that is not there, with the nearest.
    """
    problems: list[str] = []
    splits = {split: list(_examples(path, config, problems)) for split, path in config.files.items()}
    for split, read in splits.items():
        if not read and not problems:
            raise UserError(f"'{config.files[split]}' holds no rows")
    labels: list[str] = []
    if config.kind != "regression":
        _unify(splits, config.labels)
        labels = list(config.labels) or _discover(splits["train"])
        for split, read in splits.items():
            for line, example in read:
                unknown = sorted(set(_as_list(example["label"])) - set(labels))
                if unknown:
                    where = "labels" if config.labels else "the training file's labels"
                    hint = nearest(unknown[0], labels)
                    problems.append(f"{config.files[split]}:{line}: '{unknown[0]}' is not in {where}{hint}")
    rows.refuse(problems)
    if config.kind == "classification" and len(labels) < 2:
        raise UserError(f"label: the column '{config.label}' holds the one label '{labels[0]}' only")
    if config.held_out:
        texts = [example["text"] for _, example in splits["train"]]
        splits["train"], splits["validation"] = rows.hold_out(splits["train"], texts, config.held_out)
    return splits, labels


def _text_features(config: TableConfig) -> tuple[str, ...]:
    return ("text", "text_pair")[: len(config.text)]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_list(label: str | list[str]) -> list[str]:
    return label if isinstance(label, list) else [label]


def _unify(splits: Mapping[str, Sequence[rows.Row]], given: Sequence[str]) -> None:
    """Write labels that are the same number, such as 1 and 1.0, alike: as given, else the shortest way."""
    found = set(given) | {label for read in splits.values() for _, row in read for label in _as_list(row["label"])}
    groups: dict[float, list[str]] = {}
    for label in found:
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", label):
            groups.setdefault(float(label), []).append(label)
    one: dict[str, str] = {}
    for same in groups.values():
        first = min(same, key=lambda label: (label not in given, len(label), label))
        one |= {label: first for label in same if label != first and label not in given}
    if not one:
        return
    logging.warning(
        "labels that are the same number are one class: %s", ", ".join(f"{a} = {b}" for a, b in one.items())
    )
    for read in splits.values():
        for _, row in read:
            labels = [one.get(label, label) for label in _as_list(row["label"])]
            row["label"] = sorted(set(labels)) if isinstance(row["label"], list) else labels[0]


def _discover(examples: Sequence[rows.Row]) -> list[str]:
    """Return the labels of rows, sorted: as numbers if all of them are whole numbers."""
    labels = {label for _, example in examples for label in _as_list(example["label"])}
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def _examples(path: pathlib.Path, config: TableConfig, problems: list[str]) -> Iterator[rows.Row]:
    """Yield what the task needs of each good row; what is wrong with the others goes to `problems`."""
    wanted = (*config.text, config.label)
    for line, row in rows.read(path, wanted, problems, config.columns, config.quoted):
        try:
            texts = {name: rows.text(row, column) for name, column in zip(_text_features(config), config.text)}
            yield line, {**texts, "label": _label(row, config)}
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")


def _label(row: dict[str, Any], config: TableConfig) -> str | float | list[str]:
    value = rows.cell(row, config.label)
    if config.kind == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"'{config.label}' is not a number but {value!r}")
        return number
    if config.kind == "classification":
        return _label_name(value, config)
    names = [part for part in value.split(config.separator) if part.strip()] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise ValueError(f"'{config.label}' is not a list of labels but {value!r}")
    return sorted({_label_name(name, config) for name in names})


def _label_name(value: Any, config: TableConfig) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise ValueError(f"'{config.label}' is neither a string nor an integer but {value!r}")
    name = str(value).strip()
    if not name:
        raise ValueError(f"'{config.label}' is empty")
    return name
