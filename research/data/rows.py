"""Rows of the user's own CSV, TSV, JSON-lines and Parquet files; what is wrong with them, by file and line."""

import contextlib
import csv
import hashlib
import io
import json
import pathlib
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import pyarrow
from pyarrow import parquet

from research.errors import UserError, nearest

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # after one of them, but for Parquet, which compresses itself
SHOWN = 10  # bad rows in a message

Row = tuple[int, dict[str, Any]]  # its line in the file, from 1 (in Parquet its row), and its columns
T = TypeVar("T")


def read(
    path: pathlib.Path,
    wanted: Sequence[str],
    problems: list[str],
    columns: Sequence[str] = (),
    quoted: bool | None = None,
) -> Iterator[Row]:
    """Yield the good rows of a file; what is wrong with the others goes to `problems`.

    Args:
      path: the file; its suffix is one of `SUFFIXES`, which one of `COMPRESSED` may follow.
      wanted: the columns that must be there. A Parquet file gives these alone.
      problems: gets a line for each bad row.
      columns: the names of the columns of CSV and TSV files without a header.
      quoted: whether `"` quotes fields; None for yes in CSV and no in TSV.

    Raises:
      UserError: a column is not there, with the nearest, or the file is no table.
    """
    check_suffix(path)
    if suffix(path) == ".parquet":
        return _parquet(path, wanted)
    if suffix(path) in (".csv", ".tsv"):
        return _delimited(path, wanted, problems, columns, quoted)
    return _json_lines(path, wanted, problems)


def suffix(path: pathlib.PurePath) -> str:
    """Return a file's suffix, without that of its compression: ".jsonl" of "a.jsonl.gz"."""
    return pathlib.PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed; a UserError if they are not what the suffix says, or end too early."""
    compression = COMPRESSED.get(path.suffix)
    if compression is None:
        with path.open("rb") as plain:
            yield plain
        return
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 2**20) as file:  # type: ignore[arg-type]
            yield file
    except OSError as error:
        if error.errno is not None:  # the file system's, and not the decompressor's
            raise
        raise UserError(f"'{path}' cannot be decompressed as {compression}: {' '.join(str(error).split())}") from error


def check_suffix(path: pathlib.Path) -> None:
    """Raise a UserError if the file does not end as a table does."""
    if suffix(path) not in SUFFIXES:
        raise UserError(f"'{path}' does not end as a table does{nearest(suffix(path), SUFFIXES)}")


def lines(path: pathlib.Path, problems: list[str]) -> Iterator[str]:
    """Yield a file's lines with their ends; those that are not UTF-8 go to `problems`, and come mended."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problems.append(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line")
                yield line.decode("utf-8", errors="replace")


def cell(row: dict[str, Any], column: str) -> Any:
    """Return what is in a column; a ValueError if nothing is."""
    if row.get(column) is None:
        raise ValueError(f"no '{column}'")
    return row[column]


def text(row: dict[str, Any], column: str) -> str:
    """Return the text in a column; a ValueError if it is something else."""
    value = cell(row, column)
    if not isinstance(value, str):
        raise ValueError(f"'{column}' is not text but {value!r}")
    return value


def refuse(problems: Sequence[str]) -> None:
    """Raise a UserError that names the bad rows, if there are any, in one line."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        plural = "s" if len(problems) > 1 else ""
        raise UserError(f"{len(problems)} bad row{plural}: {'; '.join(problems[:SHOWN])}{more}")


def check_held_out(share: float, splits: Collection[str]) -> None:
    """Raise a UserError if `share` of the training rows cannot become the split "validation"."""
    if not 0 <= share < 1:
        raise UserError(f"held_out: {share} is no share of the training rows")
    if share and "validation" in splits:
        raise UserError("held_out: there is a validation file already; give one or the other")


def hold_out(rows: Sequence[T], keys: Sequence[str], share: float) -> tuple[list[T], list[T]]:
    """Split rows in two, the second of about `share` of them.

    Chosen by a hash of the rows' `keys`, so that rows of one key stay together and the choice survives a new order.
    """
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    groups: dict[str, int] = {}
    for digest in digests:
        groups[digest] = groups.get(digest, 0) + 1
    wanted, held = round(share * len(rows)), set()
    for digest in sorted(groups):
        if wanted <= 0:
            break
        held.add(digest)
        wanted -= groups[digest]
    parts = (
        [row for row, digest in zip(rows, digests) if digest not in held],
        [row for row, digest in zip(rows, digests) if digest in held],
    )
    if not all(parts):
        raise UserError(f"held_out: {share} of {len(rows)} rows leaves one of the two splits empty")
    return parts


def require_columns(path: pathlib.Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise a UserError if a column is not among a file's `names`, or one of these is there twice."""
    for column in wanted:
        if column not in names:
            raise UserError(f"'{path}' has no column '{column}'{nearest(column, names)}")
    if len(set(names)) < len(names):
        raise UserError(f"'{path}' has two columns of one name: {', '.join(names)}")


def _delimited(
    path: pathlib.Path, wanted: Sequence[str], problems: list[str], columns: Sequence[str], quoted: bool | None
) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a document may be a field
    tab = suffix(path) == ".tsv"
    quoted = not tab if quoted is None else quoted
    reader = csv.reader(
        lines(path, problems),
        delimiter="\t" if tab else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    names = list(columns)
    if names:
        require_columns(path, names, wanted)
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
            require_columns(path, names, wanted)
        elif len(fields) == len(names):
            yield line, dict(zip(names, fields))
        elif fields:  # an empty line is no row
            problems.append(f"{path}:{line}: {len(fields)} fields instead of {len(names)}")


def _json_lines(path: pathlib.Path, wanted: Sequence[str], problems: list[str]) -> Iterator[Row]:
    checked = False
    for number, line in enumerate(lines(path, problems), start=1):
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
            require_columns(path, list(row), wanted)
            checked = True
        yield number, row


def _parquet(path: pathlib.Path, wanted: Sequence[str]) -> Iterator[Row]:
    try:
        with parquet.ParquetFile(path) as file:
            require_columns(path, file.schema_arrow.names, wanted)
            table = file.read(columns=list(dict.fromkeys(wanted))).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"'{path}' cannot be read as Parquet: {' '.join(str(error).split())}") from error
    yield from enumerate(table, start=1)
