"""The user's own documents, pairs, conversations and questions, with all that can be wrong in them."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from research.data import files
from research.errors import UserError


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def _lines(path, objects):
    return _write(path, "".join(json.dumps(value) + "\n" for value in objects))


def _texts(source):
    return [example["text"] for example in source]


# --- documents ------------------------------------------------------------------------------------

BOOK = b"\xef\xbb\xbfOne,\r\nstill one.\r\n\r\n  \r\nTw\xc3\xb6.\r\n"


@pytest.mark.parametrize(
    ("unit", "documents"),
    [
        ("file", ["One,\nstill one.\n\n  \nTwö.\n"]),
        ("paragraph", ["One,\nstill one.", "Twö."]),
        ("line", ["One,", "still one.", "Twö."]),
    ],
)
def test_units_of_plain_text(tmp_path, unit, documents):
    assert _texts(files.text(_write(tmp_path / "book.txt", BOOK), unit=unit)) == documents


def test_folders_patterns_and_lists(tmp_path):
    paths = [_write(tmp_path / name, name) for name in ("b.txt", "a/x.txt", "a/c.md", "a/deep/d.md")]
    _lines(tmp_path / "rows.jsonl", [{"text": "row 1", "n": 1}, {"text": " "}, {"text": "row 3"}])
    assert _texts(files.text(str(tmp_path))) == ["a/x.txt", "b.txt", "row 1", "row 3"]
    assert _texts(files.text(f"{tmp_path}/**/*.md")) == ["a/c.md", "a/deep/d.md"]
    assert _texts(files.text([paths[2], paths[0]])) == ["a/c.md", "b.txt"]
    bracket = _write(tmp_path / "odd[1].txt", "odd")
    assert _texts(files.text(bracket)) == ["odd"]


def test_documents_of_tables(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["one", "two"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert _texts(files.text(str(tmp_path / "a.parquet"), field="body")) == ["one", "two"]
    with pytest.raises(UserError, match=r"has no column 'bodi'; did you mean 'body'\?"):
        files.text(str(tmp_path / "a.parquet"), field="bodi")


def test_held_out_documents(tmp_path):
    lines = [f"line {i % 80}" for i in range(100)]
    split = {}
    for order in (1, -1):
        path = _write(tmp_path / f"{order}.txt", "\n".join(lines[::order]))
        split[order] = [_texts(files.text(path, unit="line", held_out=0.1, split=s)) for s in ("train", "validation")]
    train, validation = split[1]
    assert len(validation) in (10, 11)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(lines)
    assert set(split[-1][1]) == set(validation)


def test_splits_of_files_of_their_own(tmp_path):
    paths = {split: _write(tmp_path / f"{split}.txt", split) for split in ("train", "validation", "test")}
    for split in paths:
        assert _texts(files.text(**paths, split=split)) == [split]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "lines"}, r"unit: no 'lines'; did you mean 'line'\?"),
        ({"split": "test"}, r"'.*a.txt' has no split 'test'; there are: train"),
        ({"held_out": 1.0}, "held_out: 1.0 is no share"),
        ({"held_out": 0.5}, "held_out: 0.5 of 1 rows leaves one of the two splits empty"),
        ({"held_out": 0.1, "validation": "SELF"}, "held_out: there is a validation file already"),
        ({"train": ""}, "train: no file is given"),
        ({"test": "nowhere.txt"}, "no such file or folder: 'nowhere.txt'"),
        ({"test": "nowhere/*.txt"}, r"'nowhere/\*.txt' holds no file that ends in .txt"),
        ({"test": "EMPTY"}, r"test: '.*empty.txt' holds no examples"),
    ],
)
def test_settings_that_are_wrong(tmp_path, arguments, message):
    names = {"SELF": _write(tmp_path / "a.txt", "text"), "EMPTY": _write(tmp_path / "empty.txt", "\n")}
    arguments = {name: names.get(value, value) for name, value in arguments.items()}
    with pytest.raises(UserError, match=message):
        files.text(**{"train": names["SELF"], **arguments})


def test_bad_documents_are_named_by_line(tmp_path):
    plain = _write(tmp_path / "a.txt", b"good\n\xff\n")
    table = _lines(tmp_path / "b.jsonl", [{"text": "good"}, {"text": 3}])
    with pytest.raises(UserError, match=r"^2 bad rows: .*a.txt:2: not UTF-8 at byte 1 .*b.jsonl:2: 'text' is not text"):
        files.text([plain, table])


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_pairs(tmp_path, name):
    rows = [{"de": "Ja, gut", "n": "1", "en": "Yes, good"}, {"de": "Nein", "n": "2", "en": "No"}]
    if name.endswith("jsonl"):
        path = _lines(tmp_path / name, rows)
    elif name.endswith("parquet"):
        path = str(tmp_path / name)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        quote, comma = ('"', ",") if name.endswith("csv") else ("", "\t")
        lines = [comma.join(quote + row[column] + quote for column in row) for row in rows]
        path = _write(tmp_path / name, "\n".join([comma.join(rows[0]), *lines]))
    read = files.pairs(path, source="de", target="en")
    assert list(read) == [{"source": "Ja, gut", "target": "Yes, good"}, {"source": "Nein", "target": "No"}]


def test_pairs_without_a_header_and_held_out(tmp_path):
    path = _write(tmp_path / "a.tsv", "".join(f"source {i % 10}\ttarget {i}\n" for i in range(40)))
    arguments = {"columns": ("source", "target"), "held_out": 0.2}
    train, held = (list(files.pairs(path, split=split, **arguments)) for split in ("train", "validation"))
    assert (len(train), len(held)) == (32, 8)
    assert not {pair["source"] for pair in train} & {pair["source"] for pair in held}


def test_bad_pairs(tmp_path):
    path = _write(tmp_path / "a.csv", "source,target\na,b\nc,\n ,d\ne\n")
    message = r"3 bad rows: .*a.csv:3: 'target' is empty; .*:4: 'source' is empty; .*:5: 1 fields instead of 2"
    with pytest.raises(UserError, match=message):
        files.pairs(path)
    with pytest.raises(UserError, match=r"has no column 'targte'; did you mean 'target'\?"):
        files.pairs(path, target="targte")
    with pytest.raises(UserError, match="does not end as a table does"):
        files.pairs(_write(tmp_path / "a.txt", ""))


# --- conversations --------------------------------------------------------------------------------


def _message(role, content):
    return {"role": role, "content": content}


def test_chat(tmp_path):
    first = [_message("system", "Be brief."), _message("user", "Hi"), _message("assistant", "Hello") | {"weight": 0}]
    second = [_message("user", "Bye"), _message("assistant", "So long")]
    path = _lines(tmp_path / "a.jsonl", [{"messages": first}, {"messages": second}])
    assert list(files.chat(path)) == [{"messages": first}, {"messages": second}]
    parquet.write_table(pyarrow.table({"turns": [second]}), tmp_path / "a.parquet")
    assert list(files.chat(str(tmp_path / "a.parquet"), messages="turns")) == [{"messages": second}]


def test_conversations_of_one_prompt_stay_together(tmp_path):
    rows = [[_message("user", f"question {i % 10}"), _message("assistant", f"answer {i}")] for i in range(30)]
    path = _lines(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    train, held = (list(files.chat(path, held_out=0.3, split=split)) for split in ("train", "validation"))
    assert (len(train), len(held)) == (21, 9)
    assert not {e["messages"][0]["content"] for e in train} & {e["messages"][0]["content"] for e in held}


def test_bad_conversations(tmp_path):
    rows = [
        [_message("user", "Hi"), _message("assistant", "Hello")],
        [_message("user", "Hi"), _message("asistant", "Hello")],
        [_message("user", "Hi")],
        [],
        "Hi",
        [{"role": "user", "text": "Hi"}],
        ["Hi"],
        [_message("user", None)],
    ]
    with pytest.raises(UserError) as info:
        files.chat(_lines(tmp_path / "a.jsonl", [{"messages": row} for row in rows]))
    message = str(info.value)
    assert "\n" not in message
    for part in (
        "7 bad rows: ",
        "a.jsonl:2: message 2 has the role 'asistant'; did you mean 'assistant'?",
        "a.jsonl:3: no message is the assistant's",
        "a.jsonl:4: no message is the assistant's",
        "a.jsonl:5: 'messages' is not a list of messages but 'Hi'",
        "a.jsonl:6: message 1 has no text as its 'content'",
        "a.jsonl:7: message 1 has no text as its 'content'",
        "a.jsonl:8: message 1 has no text as its 'content'",
    ):
        assert part in message
    with pytest.raises(UserError, match=r"has no column 'messages'; did you mean 'mesages'\?"):
        files.chat(_lines(tmp_path / "b.jsonl", [{"mesages": rows[0]}]))


# --- questions in SQuAD's format ------------------------------------------------------------------

CONTEXT = "Oxygen is a gas. Oxygen burns."


def _squad(questions, context=CONTEXT):
    return {"version": "v2.0", "data": [{"title": "Air", "paragraphs": [{"context": context, "qas": questions}]}]}


def test_squad_json(tmp_path):
    answers = [{"text": "a gas", "answer_start": 10}, {"text": "gas", "answer_start": 12}]
    questions = [
        {"id": "1", "question": "What is oxygen?", "answers": answers},
        {"id": "2", "question": "Does gold burn?", "answers": [], "is_impossible": True, "plausible_answers": answers},
    ]
    read = files.squad_json(_write(tmp_path / "a.json", json.dumps(_squad(questions))))
    same = {"title": "Air", "context": CONTEXT}
    assert list(read) == [
        same
        | {
            "id": "1",
            "question": questions[0]["question"],
            "answers": {"text": ["a gas", "gas"], "answer_start": [10, 12]},
        },
        same | {"id": "2", "question": questions[1]["question"], "answers": {"text": [], "answer_start": []}},
    ]


def test_questions_about_one_passage_stay_together(tmp_path):
    paths = []
    for i in range(10):
        questions = [{"id": f"{i}{k}", "question": "?", "answers": []} for k in range(2)]
        paths.append(_write(tmp_path / f"{i}.json", json.dumps(_squad(questions, f"passage {i}"))))
    train, held = (list(files.squad_json(str(tmp_path), split=s, held_out=0.2)) for s in ("train", "validation"))
    assert (len(train), len(held)) == (16, 4)
    assert not {e["context"] for e in train} & {e["context"] for e in held}


def test_bad_questions(tmp_path):
    questions = [
        {"id": "1", "question": "?", "answers": [{"text": "gas", "answer_start": 11}]},
        {"id": "2", "question": "?"},
        {"id": "4", "question": "?", "answers": [{"text": "gas", "answer_start": "12"}]},
        {"id": "3", "question": "?", "answers": []},
        {"id": "3", "question": "?", "answers": []},
    ]
    path = _write(tmp_path / "a.json", json.dumps(_squad(questions)))
    with pytest.raises(UserError) as info:
        files.squad_json(path)
    for part in (
        "4 bad rows: ",
        "a.json: question '4' of passage 1: the answer 'gas' is not at 12 of the context",
        "a.json: question '1' of passage 1: the answer 'gas' is not at 11 of the context",
        "a.json: question '2' of passage 1: no 'answers'",
        "a.json: question '3' of passage 1: its id is there twice",
    ):
        assert part in str(info.value)
    with pytest.raises(UserError, match=r"b.json:2: not JSON at column 1"):
        files.squad_json(_write(tmp_path / "b.json", '{"data":\n}'))
    with pytest.raises(UserError, match=r"'.*c.json' is not as SQuAD's files are"):
        files.squad_json(_write(tmp_path / "c.json", "[]"))
