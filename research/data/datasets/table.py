"""Any CSV, TSV, JSON-lines or Parquet file with a text column, or two, and a label column."""

import csv
import dataclasses
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import tensorflow_datasets as tfds
from pyarrow import parquet

from research.errors import UserError, nearest

KINDS = ("classification", "multi_label", "regression")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
SHOWN = 10  # bad rows in a message

Row = tuple[int, dict[str, Any]]  # its line in the file, from 1 (in Parquet its row), and its columns


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
        """Checks the settings and names them, so that an edited file is never served from the cache."""
        if self.kind not in KINDS:
            raise UserError(f"kind: no '{self.kind}'{nearest(self.kind, KINDS)}")
        if len(self.text) not in (1, 2):
            raise UserError(f"text: one column or two, not {self.text}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out: {self.held_out} is no share of the training rows")
        if self.held_out and "validation" in self.files:
            raise UserError("held_out: there is a validation file already; give one or the other")
        if self.labels and self.kind == "regression":
            raise UserError("labels: numbers have no label names; leave them out or choose another kind")
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels: one is there twice: {self.labels}")
        for path in self.files.values():
            if path.suffix not in SUFFIXES:
                raise UserError(f"'{path}' does not end as a table does{nearest(path.suffix, SUFFIXES)}")
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
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, (line, example) in enumerate(rows):
                yield position, {"id": line, **example}


def load(config: TableConfig) -> tuple[dict[str, list[Row]], list[str]]:
    """Reads a table's files.

    Returns:
      Split -> rows of `text`, `text_pair` and `label` (a name, a list of names, or a number); the label names.

    Raises:
      UserError: bad rows, all named in one line, or a column that is not there, with the nearest.
    """
    problems: list[str] = []
    splits = {split: list(_examples(path, config, problems)) for split, path in config.files.items()}
    for split, rows in splits.items():
        if not rows and not problems:
            raise UserError(f"'{config.files[split]}' holds no rows")
    labels: list[str] = []
    if config.kind != "regression":
        labels = list(config.labels) or _discover(splits["train"])
        for split, rows in splits.items():
            for line, example in rows:
                unknown = sorted(set(_as_list(example["label"])) - set(labels))
                if unknown:
                    where = "labels" if config.labels else "the training file's labels"
                    hint = nearest(unknown[0], labels)
                    problems.append(f"{config.files[split]}:{line}: '{unknown[0]}' is not in {where}{hint}")
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        plural = "s" if len(problems) > 1 else ""
        raise UserError(f"{len(problems)} bad row{plural}: {'; '.join(problems[:SHOWN])}{more}")
    if config.kind == "classification" and len(labels) < 2:
        raise UserError(f"label: the column '{config.label}' holds the one label '{labels[0]}' only")
    if config.held_out:
        splits["train"], splits["validation"] = _hold_out(splits["train"], config.held_out)
    return splits, labels


def _text_features(config: TableConfig) -> tuple[str, ...]:
    return ("text", "text_pair")[: len(config.text)]


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_list(label: str | list[str]) -> list[str]:
    return label if isinstance(label, list) else [label]


def _discover(rows: Sequence[Row]) -> list[str]:
    """Returns the labels of rows, sorted: as numbers if all of them are whole numbers."""
    labels = {label for _, example in rows for label in _as_list(example["label"])}
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def _hold_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Splits rows in two, the second of about `share` of them; equal texts fall on the same side."""
    groups: dict[str, int] = {}
    keys = [hashlib.sha256(example["text"].encode()).hexdigest() for _, example in rows]
    for key in keys:
        groups[key] = groups.get(key, 0) + 1
    wanted, held = round(share * len(rows)), set()
    for key in sorted(groups):
        if wanted <= 0:
            break
        held.add(key)
        wanted -= groups[key]
    parts = (
        [row for row, key in zip(rows, keys) if key not in held],
        [row for row, key in zip(rows, keys) if key in held],
    )
    if not all(parts):
        raise UserError(f"held_out: {share} of {len(rows)} rows leaves one of the two splits empty")
    return parts


def _examples(path: pathlib.Path, config: TableConfig, problems: list[str]) -> Iterator[Row]:
    """Yields what the task needs of each good row; what is wrong with the others goes to `problems`."""
    rows = {".csv": _delimited, ".tsv": _delimited, ".parquet": _parquet}.get(path.suffix, _json_lines)
    for line, row in rows(path, config, problems):
        try:
            texts = {name: _text(row, column) for name, column in zip(_text_features(config), config.text)}
            yield line, {**texts, "label": _label(row, config)}
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")


def _text(row: dict[str, Any], column: str) -> str:
    value = _cell(row, column)
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is not text but {value!r}")
    return value


def _cell(row: dict[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise ValueError(f"no '{column}'")
    return row[column]


def _label(row: dict[str, Any], config: TableConfig) -> str | float | list[str]:
    value = _cell(row, config.label)
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
    if not isinstance(value, str | int):
        raise ValueError(f"'{config.label}' is neither a string nor an integer but {value!r}")
    name = str(value).strip()
    if not name:
        raise ValueError(f"'{config.label}' is empty")
    return name


def _require_columns(path: pathlib.Path, names: Sequence[str], config: TableConfig) -> None:
    for column in (*config.text, config.label):
        if column not in names:
            raise UserError(f"'{path}' has no column '{column}'{nearest(column, names)}")
    if len(set(names)) < len(names):
        raise UserError(f"'{path}' has two columns of one name: {', '.join(names)}")


def _lines(path: pathlib.Path, problems: list[str]) -> Iterator[str]:
    """Yields a file's lines with their ends; those that are not UTF-8 go to `problems`, and come mended."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problems.append(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line")
                yield line.decode("utf-8", errors="replace")


def _delimited(path: pathlib.Path, config: TableConfig, problems: list[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a document may be a field
    tab = path.suffix == ".tsv"
    quoted = not tab if config.quoted is None else config.quoted
    lines = _lines(path, problems)
    reader = csv.reader(
        lines, delimiter="\t" if tab else ",", quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True
    )
    names = list(config.columns)
    if names:
        _require_columns(path, names, config)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problems.append(f"{path}:{line}: {error}")
            continue
        if fields is None:
            return
        if not names:
            names = fields
            _require_columns(path, names, config)
        elif len(fields) == len(names):
            yield line, dict(zip(names, fields))
        elif fields:  # an empty line is no row
            problems.append(f"{path}:{line}: {len(fields)} fields instead of {len(names)}")


def _json_lines(path: pathlib.Path, config: TableConfig, problems: list[str]) -> Iterator[Row]:
    checked = False
    for number, line in enumerate(_lines(path, problems), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON at column {error.colno}: {error.msg}")
            continue
        if not isinstance(row, dict):
            problems.append(f"{path}:{number}: not a JSON object")
            continue
        if not checked:
            _require_columns(path, list(row), config)
            checked = True
        yield number, row


def _parquet(path: pathlib.Path, config: TableConfig, problems: list[str]) -> Iterator[Row]:
    del problems  # Parquet has types: a file is good or it is not
    wanted = list(dict.fromkeys((*config.text, config.label)))
    try:
        with parquet.ParquetFile(path) as file:
            _require_columns(path, file.schema_arrow.names, config)
            rows = file.read(columns=wanted).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"'{path}' cannot be read as Parquet: {' '.join(str(error).split())}") from error
    yield from enumerate(rows, start=1)
