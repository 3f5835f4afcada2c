"""Prepared rows in files: folders of numpy's .npy files, mapped into memory when they are read.

A shard holds the rows of consecutive examples, column by column: sequences one after another beside their offsets, and
integers in the smallest type that holds them. It is written beside its place and renamed, so that a folder under its
name is whole. shard.json says what is in it, with sizes and checksums of the files.
"""

import json
import os
import pathlib
import shutil
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.columns import MISSING, Column, Columns, Joined
from research.errors import UserError

META = "shard.json"


class DamagedError(Exception):
    """A shard is not what was written."""


def unwritable(folder: pathlib.Path, error: OSError) -> UserError:
    """Return what to raise where the folder of prepared data cannot be written to."""
    return UserError(f"prepared data: '{folder}' cannot be written to ({error.strerror})")


def write(columns: Columns, folder: pathlib.Path) -> None:
    """Write a shard as `folder`, at once; where another process was faster, its shard is kept."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        described = [
            _write_column(temporary, i, name, value) for i, (name, value) in enumerate(columns.columns.items())
        ]
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(temporary.glob("*.npy"))}
        meta = {"rows": len(columns), "columns": described, "files": files}
        with open(temporary / META, "w", encoding="utf-8") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_column(folder: pathlib.Path, number: int, name: str, value: Column | Sequence[Any]) -> dict[str, Any]:
    """Write what rows hold under a name and return what the reader needs to know of it."""
    column = value if isinstance(value, Column) else _encoded(name, value)
    described: dict[str, Any] = {"name": name, "dtype": column.dtype.str, "json": not isinstance(value, Column)}
    values = column.values
    if len(values) and values.ndim == 1 and (values == values[0]).all():  # such as the mask of all targets
        described["repeated"] = len(values)
        values = values[:1]
    _save(folder / f"{number}.values.npy", values.astype(_smallest(values), copy=False))
    if column.offsets is not None:
        _save(folder / f"{number}.offsets.npy", column.offsets)
    return described


def _save(path: pathlib.Path, values: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())


def _smallest(values: np.ndarray) -> np.dtype:
    """Return the smallest type that holds integers; others keep theirs."""
    if values.dtype.kind not in "iu" or not values.size:
        return values.dtype
    return np.promote_types(np.min_scalar_type(values.min()), np.min_scalar_type(values.max()))


def _encoded(name: str, values: Sequence[Any]) -> Column:
    """Return values that are no numbers as JSON, nothing where there is none."""
    parts = []
    for value in values:
        try:
            text = "" if value is MISSING else json.dumps(value, ensure_ascii=False)
            same = value is MISSING or json.loads(text) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise UserError(
                f"config.data.ops: '{name}' is {type(value).__name__}, which prepared data cannot hold; an op that "
                "draws nothing may leave it out or make numbers or text of it"
            )
        parts.append(np.frombuffer(text.encode(), np.uint8))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Column(np.concatenate([*parts, np.zeros(0, np.uint8)]), offsets, np.dtype(np.uint8))


class _Texts(Sequence):
    """What `_encoded` wrote."""

    def __init__(self, column: Column):
        self._column = column

    def __len__(self) -> int:
        assert self._column.offsets is not None
        return len(self._column.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        text = self._column[index].tobytes()
        return json.loads(text) if text else MISSING


def read(folder: pathlib.Path, whole: bool = False) -> Columns:
    """Open a shard; `whole` compares the checksums of all files, and not just the sizes and those of offsets.

    Raises:
      DamagedError: a file is missing, or is not what was written.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for name, (size, checksum) in meta["files"].items():
            path = folder / name
            if path.stat().st_size != size or ((whole or "offsets" in name) and _checksum(path) != checksum):
                raise DamagedError(str(path))
        columns = {c["name"]: _read_column(folder, i, c) for i, c in enumerate(meta["columns"])}
        return Columns(columns, meta["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(str(folder)) from error


def _read_column(folder: pathlib.Path, number: int, described: dict[str, Any]) -> Any:
    values = np.load(folder / f"{number}.values.npy", mmap_mode="r")
    if "repeated" in described:
        values = np.broadcast_to(values[0], described["repeated"])
    elif not values.size:
        values = np.array(values)
    offsets = folder / f"{number}.offsets.npy"
    column = Column(values, np.load(offsets) if offsets.exists() else None, np.dtype(described["dtype"]))
    return _Texts(column) if described["json"] else column


def _checksum(path: pathlib.Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


class Shards(Joined):
    """The rows of several shards, one after another; a copy in another process opens the files itself."""

    def __init__(self, folders: Sequence[pathlib.Path]):
        """Open shards, in order.

        Raises:
          UserError: one is damaged.
        """
        self._folders = tuple(folders)
        super().__init__([part for part in map(_opened, folders) if len(part)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out the maps, which would be written out."""
        return Shards, (self._folders,)


def _opened(folder: pathlib.Path) -> Columns:
    try:
        return read(folder)
    except DamagedError as error:
        raise UserError(
            f"prepared data: '{error}' is damaged; --mode=prepare makes anew what is, or delete '{folder}'"
        ) from error
