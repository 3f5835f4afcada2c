"""Our own TFDS builders: the snippets' split rule, and the user's tables with all that can be wrong in them."""

import json
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from research import assets
from research.data import source
from research.data.datasets import movie_snippets
from research.errors import UserError

# --- movie snippets -------------------------------------------------------------------------------


@pytest.fixture
def snippets(tmp_path, monkeypatch):
    """Writes a file of snippets in the layout of the real one; returns where, and the rows."""
    rng = np.random.default_rng(0)
    rows = [(i, round(float(rng.normal()), 2) or 0.5, f"Snippet number {i}, café") for i in range(1, 61)]
    rows[4] = (5, 0.0, "no feeling")
    rows[9] = (10, 1.0, rows[2][2])  # the text of id 3
    file = tmp_path / "snippets.txt"
    file.write_text("".join(f"{i}\t{rating}\t{text}\r\n" for i, rating, text in reversed(rows)), encoding="utf-8")
    monkeypatch.setattr(assets, "resolve", lambda uri: file if uri == movie_snippets.SOURCE else pytest.fail(uri))
    return file, rows


def test_snippets_follow_the_split_rule(snippets, tmp_path):
    _, rows = snippets
    kept = [row for row in rows if row[0] not in (5, 10)]
    train, test = (source.tfds("movie_snippets", split, data_dir=str(tmp_path / "tfds")) for split in ("train", "test"))
    assert [example["id"] for example in test] == [row[0] for row in kept[::10]]
    assert [example["id"] for example in train] == [row[0] for i, row in enumerate(kept) if i % 10]
    by_id = {row[0]: row for row in rows}
    for example in [*train, *test]:
        _, rating, text = by_id[example["id"]]
        assert example == {
            "id": example["id"],
            "label": int(rating > 0),
            "rating": pytest.approx(rating),
            "text": text,
        }
    assert train.label_names == {"label": ("negative", "positive")}


def test_a_bad_line_of_snippets_is_named(snippets, tmp_path):
    file, _ = snippets
    file.write_text("1\t0.5\tgood\n2\thalf\tbad\n")
    with pytest.raises(UserError, match=r"snippets.txt:2: not 'id TAB rating TAB text'"):
        source.tfds("movie_snippets", data_dir=str(tmp_path / "tfds"))
    file.write_text("1\t0.5\tgood\n2\t-0.5\tbad\n")  # nothing half-made is in the way
    assert len(source.tfds("movie_snippets", data_dir=str(tmp_path / "tfds"))) == 1


def test_importing_our_builders_registers_nothing():
    program = (
        "import tensorflow_datasets as tfds; before = set(tfds.list_builders(with_community_datasets=False));"
        "from research.data.datasets import movie_snippets, table;"
        "assert set(tfds.list_builders(with_community_datasets=False)) == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


# --- tables ---------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """Returns `source.table` with its prepared data in the test's folder."""
    return lambda *args, **kwargs: source.table(*args, data_dir=str(tmp_path / "tfds"), **kwargs)


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


ROWS = [('good, "very" good', "pos"), ("bad\nand long", "neg"), ("naïve", "pos")]


def _csv(path, rows=ROWS):
    quoted = ['"{}",{}'.format(text.replace('"', '""'), label) for text, label in rows]
    return _write(path, "sentence,sentiment\r\n" + "".join(f"{row}\r\n" for row in quoted))


def _jsonl(path, rows=ROWS):
    return _write(path, "".join(json.dumps({"sentence": t, "sentiment": s}) + "\n" for t, s in rows))


def _parquet(path, rows=ROWS):
    texts, labels = zip(*rows)
    parquet.write_table(pyarrow.table({"other": [1.0] * len(rows), "sentence": texts, "sentiment": labels}), path)
    return str(path)


@pytest.mark.parametrize(("write", "name"), [(_csv, "a.csv"), (_jsonl, "a.jsonl"), (_parquet, "a.parquet")])
def test_formats_round_trip(table, tmp_path, write, name):
    read = table(write(tmp_path / name), text="sentence", label="sentiment")
    assert read.label_names == {"label": ("neg", "pos")}
    assert [(example["text"], example["label"]) for example in read] == [(ROWS[0][0], 1), (ROWS[1][0], 0), ("naïve", 1)]


def test_tsv_is_not_quoted_unless_told(table, tmp_path):
    file = _write(tmp_path / "a.tsv", 'text\tlabel\n"Hello" he said\ta\n"plain"\tb\n')
    assert [example["text"] for example in table(file, label="label")] == ['"Hello" he said', '"plain"']
    file = _write(tmp_path / "b.tsv", 'text\tlabel\n"tab\there"\ta\nplain\tb\n')
    assert [example["text"] for example in table(file, label="label", quoted=True)] == ["tab\there", "plain"]


def test_pairs_byte_order_mark_blank_lines_and_line_numbers(table, tmp_path):
    file = _write(tmp_path / "a.csv", b'\xef\xbb\xbfq1,q2,same\n"a\nb",c,1\n\nd,e,0\n')
    read = table(file, text=("q1", "q2"), label="same")
    assert read[0] == {"id": 2, "text": "a\nb", "text_pair": "c", "label": 1}
    assert read[1] == {"id": 5, "text": "d", "text_pair": "e", "label": 0}


def test_no_header(table, tmp_path):
    read = table(_write(tmp_path / "a.tsv", "1\tyes\n0\tno\n"), label="y", text="x", columns=("y", "x"))
    assert [example["text"] for example in read] == ["yes", "no"]


def test_labels_are_ordered_as_numbers_or_as_given(table, tmp_path):
    file = _write(tmp_path / "a.csv", "text,label\na,10\nb,2\nc,1\n")
    assert table(file, label="label").label_names["label"] == ("1", "2", "10")
    given = table(file, label="label", labels=("10", "2", "1", "unseen"))
    assert given.label_names["label"] == ("10", "2", "1", "unseen")
    assert [example["label"] for example in given] == [0, 1, 2]


def test_labels_that_are_the_same_number_are_one_class(table, tmp_path, caplog):
    file = _write(tmp_path / "a.csv", "text,label\na,1\nb,1.0\nc,2.50\nd,2.5\ne,01\n")
    read = table(file, label="label")
    assert read.label_names["label"] == ("1", "2.5")
    assert [example["label"] for example in read] == [0, 0, 1, 1, 0]
    assert "labels that are the same number are one class" in caplog.text
    given = table(file, label="label", labels=("2.50", "1.0"))
    assert [example["label"] for example in given] == [1, 1, 0, 0, 1]
    mixed = _write(
        tmp_path / "b.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1.0}\n{"text": "c", "label": 0}\n'
    )
    assert table(mixed, label="label").label_names["label"] == ("0", "1")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_multi_label(table, tmp_path, name):
    rows = [("x", ["joy", "fear"]), ("y", []), ("z", ["anger"])]
    if name.endswith("csv"):
        file = _write(tmp_path / name, "text,labels\n" + "".join(f"{t},{' | '.join(ls)}\n" for t, ls in rows))
    else:
        file = _write(tmp_path / name, "".join(json.dumps({"text": t, "labels": ls}) + "\n" for t, ls in rows))
    read = table(file, label="labels", kind="multi_label", separator="|")
    assert read.label_names == {"label": ("anger", "fear", "joy")}
    rows = np.stack([example["label"] for example in read])
    np.testing.assert_array_equal(rows, [[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    assert rows.dtype == np.float32


def test_regression(table, tmp_path):
    read = table(_write(tmp_path / "a.csv", "text,score\na,1.5\nb,-2\n"), label="score", kind="regression")
    assert [float(example["label"]) for example in read] == [1.5, -2.0]
    assert read.label_names == {}


def test_bad_rows_are_all_named_by_line(table, tmp_path):
    lines = [
        b"text,label",
        b"fine,a",
        b"one,two,three",
        b"no label,",
        b"\xff\xfe,a",
        b'"x"y,a',
        b"fine too,b",
        b"alone",
    ]
    file = _write(tmp_path / "a.csv", b"\n".join(lines) + b"\n")
    with pytest.raises(UserError) as info:
        table(file, label="label")
    message = str(info.value)
    assert message.startswith("5 bad rows: ")
    assert "\n" not in message
    for part in (
        "a.csv:3: 3 fields instead of 2",
        "a.csv:4: 'label' is empty",
        "a.csv:5: not UTF-8 at byte 1 of the line",
        "a.csv:6: ",
        "a.csv:8: 1 fields instead of 2",
    ):
        assert part in message


def test_bad_json_lines(table, tmp_path):
    good = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
    file = _write(tmp_path / "a.jsonl", good + '{"text": \n[1]\n{"text": "a"}\n{"text": 3, "label": "x"}\n')
    with pytest.raises(UserError) as info:
        table(file, label="label")
    for part in (
        ":3: not JSON at column 1",
        ":4: not a JSON object",
        ":5: no 'label'",
        ":6: 'text' is not text but 3",
    ):
        assert part in str(info.value)


def test_many_bad_rows_are_counted(table, tmp_path):
    file = _write(tmp_path / "a.csv", "text,score\n" + "a,much\n" * 25)
    with pytest.raises(UserError, match=r"^25 bad rows: .*a.csv:2: 'score' is not a number but 'much'.*; and 15 more$"):
        table(file, label="score", kind="regression")


def test_a_bad_row_of_another_split_is_found_too(table, tmp_path):
    train = _write(tmp_path / "a.csv", "text,label\na,yes\nb,no\n")
    test = _write(tmp_path / "b.csv", "text,label\na,yse\n")
    with pytest.raises(UserError, match=r"1 bad row: .*b.csv:2: 'yse' is not in the training file's labels.*'yes'"):
        table(train, test=test, label="label")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "lable"}, r"has no column 'lable'; did you mean 'label'\?"),
        ({"text": "txt"}, r"has no column 'txt'; did you mean 'text'\?"),
        ({"kind": "clasification"}, r"kind: no 'clasification'; did you mean 'classification'\?"),
        ({"text": ("a", "b", "c")}, "text: one column or two"),
        ({"held_out": 1.5}, "held_out: 1.5"),
        ({"held_out": 0.1, "validation": "SELF"}, "held_out: there is a validation file"),
        ({"labels": ("x", "y"), "kind": "regression"}, "labels: numbers have no label names"),
        ({"split": "test"}, "has no split 'test'"),
        ({"validation": "nowhere.csv"}, "no such file or folder: 'nowhere.csv'"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_settings_that_are_wrong(table, tmp_path, name, arguments, message):
    if name == "a.csv":
        file = _write(tmp_path / name, "text,label\na,1\nb,0\n")
    elif name == "a.jsonl":
        file = _write(tmp_path / name, '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    else:
        file = str(tmp_path / name)
        parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1, 0]}), file)
    arguments = {key: file if value == "SELF" else value for key, value in arguments.items()}
    with pytest.raises(UserError, match=message):
        table(file, **{"label": "label", **arguments})


def test_files_that_are_no_tables(table, tmp_path):
    with pytest.raises(UserError, match=r"does not end as a table does; did you mean '.csv'\?"):
        table(_write(tmp_path / "a.cvs", "text,label\n"), label="label")
    with pytest.raises(UserError, match="holds no rows"):
        table(_write(tmp_path / "a.csv", "text,label\n"), label="label")
    with pytest.raises(UserError, match="holds the one label 'a' only"):
        table(_write(tmp_path / "b.csv", "text,label\nx,a\n"), label="label")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        table(_write(tmp_path / "a.parquet", "junk"), label="label")


def test_held_out_rows(table, tmp_path):
    rows = [(f"text {i % 150}", "ab"[i % 2]) for i in range(200)]  # 50 texts are there twice
    read = {}
    for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        file = _jsonl(tmp_path / name, order)
        arguments = {"text": "sentence", "label": "sentiment", "held_out": 0.2}
        read[name] = {
            split: [example["text"] for example in table(file, split=split, **arguments)]
            for split in ("train", "validation")
        }
    train, validation = read["a.jsonl"]["train"], read["a.jsonl"]["validation"]
    assert len(validation) in (40, 41)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(text for text, _ in rows)
    assert set(read["b.jsonl"]["validation"]) == set(validation)


def test_an_edited_file_is_never_stale_and_a_moved_one_is_not_prepared_again(table, tmp_path):
    file = _csv(tmp_path / "a.csv")
    arguments = {"text": "sentence", "label": "sentiment"}
    first = table(file, **arguments)
    prepared = {path: path.stat().st_mtime_ns for path in (tmp_path / "tfds" / "table").iterdir()}
    table(_csv(tmp_path / "moved.csv"), **arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tfds" / "table").iterdir()} == prepared
    _csv(tmp_path / "a.csv", [("new", "neg"), *ROWS])
    assert [example["text"] for example in table(file, **arguments)] == ["new", *(example["text"] for example in first)]
