"""Random access to the rows of Parquet and JSON-lines files that are too large for memory.

Parquet: opening reads the footers alone. A row costs the decoding of its row group, of the wanted columns only; the
last few groups are kept, so that reading in order decodes each once. Reading in random order decodes one a row, which
for the groups of 1,000 rows that the hub writes takes some milliseconds a row: read in order once (as preparing does)
and shuffle what was made of the rows.

JSON lines: where each line begins is found by reading the file once, at some hundred MB/s, and kept beside the other
caches; after that a row costs one read of its own bytes, in any order. (Parquet could not hold all that JSON can, such
as a field that is a number here and a text there.) Compressed lines cannot be entered in the middle, so that they are
decompressed into the cache, once.
"""

import array
import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from research import assets
from research.data import rows
from research.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
GROUPS = 8  # row groups that are kept decoded, in all


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[dict[str, Any]]):
    """The rows of files, one file after the other; safe to share between threads and to pickle.

    Attributes:
      files: each ends in one of `SUFFIXES`, JSON lines perhaps in one of `rows.COMPRESSED` after that.
      columns: those to read; all where there are none.

    Raises:
      UserError: a file is damaged, or has not the columns.
    """

    files: tuple[pathlib.Path, ...]
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        _ = self._ends

    def __len__(self) -> int:
        """The number of rows."""
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """Return a row; a UserError if it is not JSON."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: there are {len(self)} rows")
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number].row(int(index) - (self._ends[number - 1] if number else 0))

    def place(self, index: int) -> str:
        """Return where a row is, for a message."""
        number = bisect.bisect_right(self._ends, index)
        return f"{self.files[number]}: row {index - (self._ends[number - 1] if number else 0) + 1}"

    @functools.cached_property
    def _parts(self) -> list[Any]:
        return [(_Parquet if rows.suffix(path) == ".parquet" else _Lines)(path, self.columns) for path in self.files]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(part.count for part in self._parts))

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "columns": self.columns}


@dataclasses.dataclass(frozen=True)
class Examples(Sequence[dict[str, Any]]):
    """What a function makes of rows, when they are asked for.

    Attributes:
      rows: the rows.
      make: from a row to an example; a ValueError says what is wrong with the row.
      chosen: int64, the numbers of the rows; None for all.
    """

    rows: Rows
    make: Callable[[dict[str, Any]], dict[str, Any]]
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.rows) if self.chosen is None else len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        """Return an example; a UserError if the row is a bad one."""
        number = int(index if self.chosen is None else self.chosen[index])
        try:
            return self.make(self.rows[number])
        except ValueError as error:
            raise UserError(f"{self.rows.place(number)}: {error}") from None


class _Parquet:
    """One Parquet file."""

    def __init__(self, path: pathlib.Path, columns: tuple[str, ...]):
        try:
            with parquet.ParquetFile(path) as file:
                names, metadata = file.schema_arrow.names, file.metadata
                sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"'{path}' cannot be read as Parquet: {' '.join(str(error).split())}") from error
        rows.require_columns(path, names, columns)
        self.path, self.columns, self.ends = path, columns, list(itertools.accumulate(sizes))
        self.count = sum(sizes)

    def row(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self.ends, index)
        table = _row_group(self.path, group, self.columns)
        return table.slice(index - (self.ends[group - 1] if group else 0), 1).to_pylist()[0]


@functools.lru_cache(GROUPS)
def _row_group(path: pathlib.Path, group: int, columns: tuple[str, ...]) -> pyarrow.Table:
    try:
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=list(columns) or None, use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' cannot be read as Parquet: {' '.join(str(error).split())}") from error


class _Lines:
    """One file of JSON lines."""

    def __init__(self, path: pathlib.Path, columns: tuple[str, ...]):
        self.path, self.columns = path, columns
        self.plain, self.starts = _indexed(path)
        self.count = len(self.starts) - 1
        if self.count:
            rows.require_columns(path, list(self.row(0, every=True)), columns)

    def row(self, index: int, every: bool = False) -> dict[str, Any]:
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        with self.plain.open("rb", buffering=0) as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            row = json.loads(line.decode("utf-8-sig" if index == 0 else "utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: row {index + 1} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{self.path}: row {index + 1} is not a JSON object")
        return row if every or not self.columns else {name: row.get(name) for name in self.columns}


def _indexed(path: pathlib.Path) -> tuple[pathlib.Path, np.ndarray]:
    """Return a file of uncompressed lines, and where those begin that are not blank, and the last ends.

    What is made for this goes to the cache under a name that changes with the file, and appears whole or not at all.
    """
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    folder = assets.cache_dir() / "lines"
    base = folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
    index = base.with_suffix(".npy")
    plain = base.with_suffix(".jsonl") if path.suffix in rows.COMPRESSED else path
    if not (index.exists() and plain.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        logging.info("finding the lines of %s", path)
        _make_index(path, index, plain)
    return plain, np.load(index, mmap_mode="r")


def _make_index(path: pathlib.Path, index: pathlib.Path, plain: pathlib.Path) -> None:
    partial = index.with_name(f"{uuid.uuid4().hex}.partial")
    partial.mkdir()
    starts, position = array.array("q"), 0
    try:
        with rows.opened(path) as file, (partial / "lines").open("wb") as copy:
            for line in file:
                if line.strip():
                    starts.append(position)
                position += len(line)
                if plain != path:
                    copy.write(line)
        starts.append(position)
        np.save(partial / "index.npy", np.array(starts, np.int64))
        if plain != path:
            os.replace(partial / "lines", plain)
        os.replace(partial / "index.npy", index)
    except OSError as error:
        raise UserError(f"the lines of '{path}' cannot be kept in '{index.parent}': {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
