"""Rows of Parquet and JSON lines, compressed or not, read one by one out of files that stay where they are."""

import concurrent.futures
import json
import pickle

import pyarrow
import pytest
from pyarrow import parquet

from research.data import files, row_access, rows
from research.errors import UserError

RECORDS = [{"text": f"räw {i}", "n": i, "more": ["x" * (i % 7)]} for i in range(100)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESEARCH_CACHE", str(tmp_path / "cache"))
    row_access._row_group.cache_clear()
    return tmp_path / "cache"


def write(path, records=RECORDS):
    """Write records in the form, and the compression, that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=10)
        return path
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if compression := rows.COMPRESSED.get(path.suffix):
        with pyarrow.CompressedOutputStream(str(path), compression) as file:
            file.write(content)
    else:
        path.write_bytes(content)
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_any_order_by_threads_and_pickled(tmp_path, name):
    read = row_access.Rows((write(tmp_path / name), write(tmp_path / "b" / name, RECORDS[:3])))
    order = [102, 0, 57, 99, 100, 3] * 5
    wanted = [(RECORDS + RECORDS[:3])[i] for i in order]
    assert len(read) == 103
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pickle.loads(pickle.dumps(read)).__getitem__, order)) == wanted
    for index in (-1, 103):
        with pytest.raises(IndexError):
            read[index]


@pytest.mark.parametrize("name", NAMES)
def test_columns(tmp_path, name):
    path = write(tmp_path / name)
    assert row_access.Rows((path,), ("n", "text"))[5] == {"n": 5, "text": "räw 5"}
    with pytest.raises(UserError, match=r"has no column 'txt'; did you mean 'text'\?"):
        row_access.Rows((path,), ("txt",))


def test_other_columns_and_row_groups_of_parquet_are_not_read(tmp_path, monkeypatch):
    path, asked = write(tmp_path / "a.parquet"), []
    read_row_group = parquet.ParquetFile.read_row_group

    def watched(self, group, columns=None, **options):
        asked.append((group, columns))
        return read_row_group(self, group, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", watched)
    read = row_access.Rows((path,), ("text",))
    assert asked == []
    assert [read[i]["text"] for i in range(30, 50)] == [f"räw {i}" for i in range(30, 50)]
    assert asked == [(3, ["text"]), (4, ["text"])]


def test_lines_are_found_once_and_again_when_the_file_changes(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz")
    assert len(row_access.Rows((path,))) == 100
    with monkeypatch.context() as patched:
        patched.setattr(row_access, "_make_index", None)
        assert row_access.Rows((path,))[7] == RECORDS[7]
    write(path, RECORDS[50:])
    assert row_access.Rows((path,))[0] == RECORDS[50]
    assert not list(cache.rglob("*.partial"))


def test_blank_lines_and_marks_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(row_access.Rows((path,))) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_files(tmp_path, cache, name):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{name}' cannot be (decompressed|read as Parquet)"):
        row_access.Rows((path,))
    assert not [file for file in cache.rglob("*") if file.is_file()]
    with pytest.raises(UserError, match=f"{name}' cannot be (decompressed|read as Parquet)"):
        files.text(str(path))


def test_rows_that_are_not_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n[1]\n')
    read = row_access.Rows((path,))
    with pytest.raises(UserError, match=r"a.jsonl: row 2 is not JSON"):
        read[1]
    with pytest.raises(UserError, match=r"a.jsonl: row 3 is not a JSON object"):
        read[2]


# --- by way of the functions that configs name ----------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "a.csv.gz", "a.txt.zst"])
def test_compressed_documents(tmp_path, name):
    if name in NAMES:
        path = write(tmp_path / name)
    else:
        path = tmp_path / name
        lines = ["text", *(record["text"] for record in RECORDS)][name.endswith("zst") :]
        with pyarrow.CompressedOutputStream(str(path), rows.COMPRESSED[path.suffix]) as file:
            file.write("\n".join(lines).encode())
    assert [example["text"] for example in files.text(str(path), unit="line")] == [r["text"] for r in RECORDS]
    found = files.text(str(tmp_path)) if path.suffix != ".parquet" and name != "a.txt.zst" else [0] * 100
    assert len(found) == 100


def test_large_files_stay_where_they_are(tmp_path, monkeypatch):
    path = str(write(tmp_path / "a.parquet"))
    small = files.text(path)
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    large = files.text(path)
    assert isinstance(large.records, row_access.Examples)
    assert list(large) == list(small)
    train, held = (pickle.loads(pickle.dumps(files.text(path, held_out=0.1, split=s))) for s in ("train", "validation"))
    assert (len(train), len(held)) == (90, 10)
    assert sorted(e["text"] for e in [*train, *held]) == sorted(e["text"] for e in small)
    with pytest.raises(UserError, match="has no split 'test'; there are: train, validation"):
        files.text(path, held_out=0.1, split="test")
    with pytest.raises(UserError, match=r"a.parquet: row 1: 'n' is not text but 0"):
        files.text(path, field="n")[0]


def test_rows_as_they_are(tmp_path):
    for i in range(2):
        write(tmp_path / "folder" / f"{i}.jsonl.zst", RECORDS[i * 50 : i * 50 + 50])
    assert list(files.table_rows(str(tmp_path / "folder"))) == RECORDS
    assert files.table_rows(str(tmp_path / "folder"), columns=("n",), split="validation", held_out=0.5)[0].keys() == {
        "n"
    }
