"""Our builders of language data, prepared from small files in the formats of the real ones."""

import json
import struct
import zlib

import pytest

from research import assets
from research.data import source
from research.data.datasets import disfl_qa, jane_austen, libreoffice
from research.errors import UserError

SPLITS = ("train", "validation", "test")


@pytest.fixture
def read(tmp_path):
    """Returns a function that reads the splits of a dataset, prepared in the test's folder."""
    return lambda name: {split: list(source.tfds(name, split, data_dir=str(tmp_path / "tfds"))) for split in SPLITS}


# --- Jane Austen ----------------------------------------------------------------------------------


def _r_lines(lines):
    """A record of an R lazy-load file: a character vector."""
    value = struct.pack(">2sIIII5s", b"X\n", 3, 0x040201, 0x030500, 5, b"UTF-8") + struct.pack(">II", 16, len(lines))
    for line in lines:
        flags = 0x40009 if line.isascii() else 0x8009
        value += struct.pack(">II", flags, len(line.encode())) + line.encode()
    return struct.pack(">I", len(value)) + zlib.compress(value)


def _novel(title, chapters, heading="CHAPTER {}"):
    lines = [title.upper(), "", "by Jane Austen", "", ""]
    for number in range(1, chapters + 1):
        if number in (1, 21):
            lines += [f"VOLUME {'I' if number == 1 else 'II'}", "", ""]
        lines += [
            heading.format(number),
            "",
            f"It cost £{number} in {title}.",
            "",
            "word " * 20 + f"{number}",
            "of two",
        ]
        lines += ["lines.", ""]
    return lines


@pytest.fixture
def austen(tmp_path, monkeypatch):
    chapters = dict(zip(jane_austen.NOVELS, (41, 1, 2, 3, 20, 10)))
    novels = [_novel(title, count) for title, count in chapters.items()]
    file = tmp_path / "Rdata.rdb"
    file.write_bytes(b"".join(map(_r_lines, reversed(novels))))
    monkeypatch.setattr(assets, "resolve", lambda uri: file if uri == jane_austen.SOURCE else pytest.fail(uri))
    return file, chapters


def test_chapters(austen, read):
    _, chapters = austen
    splits = read("jane_austen")
    held = {"validation": [(0, 10), (0, 30), (4, 10), (5, 10)], "test": [(0, 20), (0, 40), (4, 20)]}
    for split, wanted in held.items():
        assert [(example["novel"], example["chapter"]) for example in splits[split]] == wanted
    assert sum(map(len, splits.values())) == sum(chapters.values())
    train = {(int(e["novel"]), int(e["chapter"])): e["text"] for e in splits["train"]}
    assert train[0, 1].startswith("EMMA\n\nby Jane Austen\n\n\nVOLUME I\n\n\nCHAPTER 1\n\nIt cost £1 in Emma.\n\nword")
    assert train[0, 1].endswith(" 1\nof two\nlines.\n")
    assert train[0, 21].startswith("VOLUME II\n\n\nCHAPTER 21\n")
    assert train[3, 2].startswith("CHAPTER 2\n")


def test_paragraphs_have_the_splits_of_their_chapters(austen, read):
    splits = read("jane_austen/paragraphs")
    assert [(e["label"], e["chapter"]) for e in splits["test"]] == [(0, 20), (0, 40), (4, 20)]
    assert splits["test"][0]["text"] == "word " * 20 + "20 of two lines."  # the others are too short
    assert len(splits["train"]) == 77 - 7


def test_chapters_by_roman_numbers():
    lines = _novel("Persuasion", 3, "Chapter {}")
    lines[lines.index("Chapter 2")] = "Chapter XIV"
    assert [chapter.count("Chapter") for chapter in jane_austen.chapters(lines)] == [1, 1, 1]


def test_other_files_of_r_are_refused(austen, read):
    file, _ = austen
    file.write_bytes(_r_lines(["WATSON'S LIFE", ""]))
    with pytest.raises(UserError, match="holds other novels: watson's life"):
        read("jane_austen")
    file.write_bytes(b"\0\0\0\1junk")
    with pytest.raises(UserError, match=r"'.*Rdata.rdb' is not a file of lines of R"):
        read("jane_austen")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jane_austen/paragraf", "dataset 'jane_austen' has no config 'paragraf'; did you mean 'paragraphs'"),
        ("libreoffice/de-en", "dataset 'libreoffice' has no config 'de-en'"),
        ("disfl_qa/v2", "dataset 'disfl_qa' has no config 'v2'"),
        ("jane_austin", "unknown dataset 'jane_austin'; did you mean 'jane_austen'"),
    ],
)
def test_unknown_configs(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        source.tfds(name, data_dir=str(tmp_path))


# --- Disfl-QA -------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path, monkeypatch):
    file = tmp_path / "test.jsonl"
    monkeypatch.setattr(assets, "resolve", lambda uri: file if uri == disfl_qa.SOURCE else pytest.fail(uri))

    def write(rows):
        names = ("passage", "question", "answer")
        file.write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))

    return write


def test_questions_are_split_by_passage(questions, read):
    passages = [f"Passage {i} has É and 4{i} , 000 ." for i in range(20)]
    rows = [(passage, f"question {i} ?", f"4{i},000") for i, passage in enumerate(passages)]
    questions([*rows, *((passage, "and what ?", "unknown") for passage in passages)])
    splits = read("disfl_qa")
    assert [len(splits[split]) for split in SPLITS] == [28, 4, 8]
    contexts = [{example["context"] for example in splits[split]} for split in SPLITS]
    assert len(set.union(*contexts)) == sum(map(len, contexts)) == 20
    assert splits["validation"][1] == {
        "id": "11",
        "context": passages[10],
        "question": "question 10 ?",
        "answers": {"text": ["410 , 000"], "answer_start": [passages[10].index("410")]},
    }
    assert splits["validation"][2]["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("passage", "answer", "where"),
    [
        ("from 1910 - 1940 .", "FROM 1910-1940", "from 1910 - 1940"),
        ("Japanese men of Japan .", "Japan", "Japan ."),
        ("only Japanese men", "Japan", "Japan"),
        ('the " entrenched "  provisions', '"entrenched" provisions', '" entrenched "  provisions'),
    ],
)
def test_answers_are_located_in_the_passage_as_it_is(passage, answer, where):
    start, end = disfl_qa.locate(passage, answer)
    assert passage[start:].startswith(where)
    assert passage[start:end] == where.removesuffix(" .")


def test_bad_lines_of_questions_are_named(questions, read):
    questions([("a passage", "a question ?", "elsewhere")])
    with pytest.raises(UserError, match=r"test.jsonl:1: the answer 'elsewhere' is not in the passage"):
        read("disfl_qa")
    questions([("a passage", "?", "passage"), ("a passage", "a question ?")])
    with pytest.raises(UserError, match=r"test.jsonl:2: no JSON object of 'passage', 'question' and 'answer'"):
        read("disfl_qa")


# --- LibreOffice ----------------------------------------------------------------------------------


def _page(paragraphs):
    body = "".join(f'<p id="{identity}" class="paragraph">{text}</p>\n' for identity, text in paragraphs.items())
    return f"<!DOCTYPE html><html><head><title>Title</title></head><body><p>no id here at all</p>{body}</body></html>"


def _pages(folder, pages):
    for name, paragraphs in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(paragraphs), encoding="utf-8")
    return folder


@pytest.fixture
def office(tmp_path, monkeypatch):
    """Writes pages in two languages; returns what makes them the help's."""
    folders = {libreoffice.SOURCES[name]: tmp_path / name for name in ("en", "fr")}
    monkeypatch.setattr(assets, "resolve", lambda uri: folders[uri])
    return lambda pages: [
        _pages(folder, {name: {i: text[k] for i, text in page.items()} for name, page in pages.items()})
        for k, folder in enumerate(folders.values())
    ]


def test_text_of_paragraphs():
    mac = (
        '<span class="switchinline"><span hidden="true" class="MAC">Cmd<span>!</span>\n</span><span>Ctrl</span></span>'
    )
    page = _page(
        {
            "a": f"Press {mac}+<span class='emph'>F&ouml;</span> &lt;now&gt;",
            "b": "one<br>two\n  three<img src='x'>",
            "c": 'In <span class="WRITER">text</span><span class="CALC">cells</span> here',
        }
    )
    page += '<p id="a">again, as part of another page</p>'
    assert libreoffice.paragraphs(page) == {"a": "Press Ctrl+Fö <now>", "b": "one two three"}


def test_pairs_are_those_of_one_id_in_one_file(office):
    folders = office(
        {
            "b/x.html": {
                "1": ("This is one of them", "En voici une autre"),
                "2": ("too short", "trop court, celui-ci aussi"),
                "3": ("long " * 61, "assez long pour en être"),
                "4": ("A = B over C", "A = B over C"),
                "5": ("This is one of them", "Mais elle y est déjà"),
            },
            "a.html": {"1": ("And here is another one", "Et en voilà une autre")},
        }
    )
    assert list(libreoffice.pairs(*folders)) == [
        ("And here is another one", "Et en voilà une autre", "a.html"),
        ("This is one of them", "En voici une autre", "b/x.html"),
    ]
    with pytest.raises(UserError, match="share no page"):
        list(libreoffice.pairs(folders[0], folders[1] / "nowhere"))


def test_files_are_in_one_split_and_near_duplicates_do_not_leak(office, read):
    pages = {}
    for i in range(200):
        name = "".join("abcdefghij"[int(digit)] for digit in str(i))
        page = {k: (f"Sentence {k} of the file {name}", f"La phrase {k} de {name}") for k in "xyz"}
        # But for its number and its case the same in all files.
        page["near"] = (f"Click {'OK' if i % 2 else 'ok'}, then enter {i}.", f"Cliquez là dans {name} ici")
        page["target"] = (f"Another one in {name} is here", f"Toujours {i} la même")
        pages[f"{i}.html"] = page
    office(pages)
    splits = read("libreoffice/en-fr")
    files = {split: {example["file"] for example in splits[split]} for split in SPLITS}
    assert all(len(files[split]) > 3 for split in SPLITS)
    assert len(set.union(*files.values())) == sum(map(len, files.values())) == 200
    for split in SPLITS:
        near = [e for e in splits[split] if e["source"].startswith("Click") or e["target"].startswith("Toujours")]
        assert len(near) == (2 * len(files["test"]) if split == "test" else 0)
        assert len(splits[split]) - len(near) == 3 * len(files[split])
    assert set(splits["train"][0]) == {"source", "target", "file"}
