"""The user's own files, and data sets of the hub, for language work.

Documents, pairs, conversations, preferences, questions in SQuAD's format, or rows as they are.

Files are read whole and held in memory. All are read, so that all are checked, whichever split is asked for, and every
bad row is named by file and line. Parquet and JSON lines of more than `IN_MEMORY` bytes are left where they are: see
research/data/row_access.py for what a row costs. Their rows are checked when they are read, documents without a word
stay, and the share that is held out is drawn by the numbers of the rows.

Every function takes `train`, `validation` and `test`, each one path or several: files, folders (files of a known
suffix at any depth), patterns such as "books/**/*.md", a data set of the hub, whose split of that name is meant (see
research/data/hub.py), or anything else that `assets.resolve` takes; `split`, one of these three names; and `held_out`,
the share of the training examples that becomes "validation" where no files are given for that. Which ones is a
function of their texts: equal ones stay together, and their order is of no account. `.gz` or `.zst` may end the name
of any text file.
"""

import dataclasses
import functools
import glob
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from research import assets, storage
from research.data import hub, row_access, rows
from research.data.preferences import FIELDS, conversations
from research.data.source import Source
from research.errors import UserError, nearest

Paths = str | Sequence[str]
Example = dict[str, Any]
Read = Callable[[pathlib.Path, list[str]], Iterator[Example]]  # examples of a file; what is wrong goes to the list

UNITS = ("file", "paragraph", "line")
IN_MEMORY = 2**30  # bytes of files, compressed or not
ROLES = ("system", "user", "assistant")


def text(
    train: Paths,
    validation: Paths | None = None,
    test: Paths | None = None,
    split: str = "train",
    held_out: float = 0.0,
    unit: str = "file",
    field: str = "text",
) -> Source:
    """Return documents: {"text": str}. Those without a word are left out.

    Args:
      train, validation, test: tables (.csv, .tsv, .jsonl, .ndjson, .parquet), and plain text under any other suffix;
        of a folder .txt files and tables.
      split, held_out: see above.
      unit: what a document is in plain text: the "file", a "paragraph" (blank lines part them) or a "line". In a
        table it is a row.
      field: the column of text in a table.

    Raises:
      UserError: no such file, column, unit or split; bad rows.
    """
    if unit not in UNITS:
        raise UserError(f"unit: no '{unit}'{nearest(unit, UNITS)}")
    document = functools.partial(_document, field=field)

    def read(path: pathlib.Path, problems: list[str]) -> Iterator[Example]:
        if rows.suffix(path) in rows.SUFFIXES:
            every = _table(path, problems, (field,), document)
        else:
            every = ({"text": document} for document in _plain(path, problems, unit))
        return (example for example in every if example["text"].strip())

    paths = {"train": train, "validation": validation, "test": test}
    return _source(
        paths,
        (".txt", *rows.SUFFIXES),
        read,
        lambda example: example["text"],
        split,
        held_out,
        _Rows((field,), document),
    )


def pairs(
    train: Paths,
    source: str = "source",
    target: str = "target",
    validation: Paths | None = None,
    test: Paths | None = None,
    split: str = "train",
    held_out: float = 0.0,
    columns: Sequence[str] = (),
    quoted: bool | None = None,
) -> Source:
    """Return pairs of texts, such as translations or summaries: {"source": str, "target": str}.

    Args:
      train, validation, test: tables: .csv, .tsv, .jsonl, .ndjson or .parquet.
      source, target: their columns.
      split, held_out: see above; pairs of equal sources stay together.
      columns: the names of the columns of CSV and TSV files without a header.
      quoted: whether `"` quotes fields; None for yes in CSV and no in TSV.

    Raises:
      UserError: no such file, column or split; bad rows, those with an empty side among them.
    """
    pair = functools.partial(_pair, source=source, target=target)

    def read(path: pathlib.Path, problems: list[str]) -> Iterator[Example]:
        return _table(path, problems, (source, target), pair, columns, quoted)

    paths = {"train": train, "validation": validation, "test": test}
    large = _Rows((source, target), pair)
    return _source(paths, rows.SUFFIXES, read, lambda example: example["source"], split, held_out, large)


def chat(
    train: Paths,
    validation: Paths | None = None,
    test: Paths | None = None,
    split: str = "train",
    held_out: float = 0.0,
    messages: str = "messages",
) -> Source:
    """Return conversations: {"messages": [{"role": "user", "content": "Hello"}, ...]}.

    Args:
      train, validation, test: JSON lines (.jsonl, .ndjson) or .parquet.
      split, held_out: see above; conversations that are equal up to the first answer stay together.
      messages: the field of the list. Each message has a `role`, of system, user and assistant, and a `content` of
        text; what else it has is kept. One of a conversation is the assistant's.

    Raises:
      UserError: no such file, field or split; bad rows.
    """
    conversation = functools.partial(_conversation, column=messages)

    def read(path: pathlib.Path, problems: list[str]) -> Iterator[Example]:
        return _table(path, problems, (messages,), conversation)

    paths = {"train": train, "validation": validation, "test": test}
    return _source(paths, row_access.SUFFIXES, read, _prompt, split, held_out, _Rows((messages,), conversation))


def preferences(
    train: Paths,
    validation: Paths | None = None,
    test: Paths | None = None,
    split: str = "train",
    held_out: float = 0.0,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
) -> Source:
    """Return preferences: {"prompt": messages, "chosen": messages, "rejected": messages}.

    Args:
      train, validation, test: JSON lines (.jsonl, .ndjson) or .parquet.
      split, held_out: see above; preferences of equal prompts stay together.
      prompt: the field of what is answered, a text or messages; "" where both answers are whole conversations, of
        which the prompt is what they have in common.
      chosen, rejected: the fields of the answers, texts or messages.

    Raises:
      UserError: no such file, field or split; bad rows, those whose two answers are the same among them.
    """
    fields = (prompt, chosen, rejected)
    preference = functools.partial(_preference, fields=fields)
    wanted = tuple(field for field in fields if field)

    def read(path: pathlib.Path, problems: list[str]) -> Iterator[Example]:
        return _table(path, problems, wanted, preference)

    def key(example: Example) -> str:
        return json.dumps([(message["role"], message["content"]) for message in example["prompt"]])

    paths = {"train": train, "validation": validation, "test": test}
    return _source(paths, row_access.SUFFIXES, read, key, split, held_out, _Rows(wanted, preference))


def table_rows(
    train: Paths,
    validation: Paths | None = None,
    test: Paths | None = None,
    split: str = "train",
    held_out: float = 0.0,
    columns: Sequence[str] = (),
) -> Source:
    """Return rows as they are: {column: value}. However few they are, they are not held in memory.

    Args:
      train, validation, test: JSON lines (.jsonl, .ndjson) or .parquet.
      split, held_out: see above; which rows are held out is drawn by their numbers.
      columns: those to read, which must be there; all where there are none.

    Raises:
      UserError: no such file, column or split; a damaged file.
    """
    paths = {"train": train, "validation": validation, "test": test}
    given, files = _given(paths, row_access.SUFFIXES)
    rows.check_held_out(held_out, files)
    return _rows_of(given, files, _Rows(tuple(columns), dict), split, held_out)


def squad_json(
    train: Paths,
    validation: Paths | None = None,
    test: Paths | None = None,
    split: str = "train",
    held_out: float = 0.0,
) -> Source:
    """Return questions about passages, from files in the format of SQuAD 1.1 and 2.0.

    The features are those of TFDS's squad: `id`, `title`, `context`, `question` and `answers`, which are `text` and
    `answer_start`, lists that are both empty where the passage has no answer.

    Args:
      train, validation, test: .json files.
      split, held_out: see above; questions about one passage stay together.

    Raises:
      UserError: no such file or split; bad questions, by file and id: one without a field, an id that is there twice,
        or an answer that is not where the file says.
    """
    paths = {"train": train, "validation": validation, "test": test}
    return _source(paths, (".json",), _questions, lambda example: example["context"], split, held_out)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How rows of files that are not held in memory become examples: of these columns, by this function."""

    columns: tuple[str, ...]
    make: Callable[[dict[str, Any]], Example]


def _source(
    paths: dict[str, Paths | None],
    suffixes: Sequence[str],
    read: Read,
    key: Callable[[Example], str],
    split: str,
    held_out: float,
    large: _Rows | None = None,
) -> Source:
    """Return the examples of one split: of few files, read whole; of many, where they can be, as they are asked for."""
    given, files = _given(paths, suffixes)
    rows.check_held_out(held_out, files)
    every = [path for some in files.values() for path in some]
    lazy = large and all(rows.suffix(path) in row_access.SUFFIXES for path in every)
    if large and lazy and sum(path.stat().st_size for path in every) > IN_MEMORY:
        return _rows_of(given, files, large, split, held_out)
    problems: list[str] = []
    splits = {name: [example for path in some for example in read(path, problems)] for name, some in files.items()}
    rows.refuse(problems)
    for name, examples in splits.items():
        if not examples:
            raise UserError(f"{name}: {_listed(given[name])} holds no examples")
    if held_out:
        keys = [key(example) for example in splits["train"]]
        splits["train"], splits["validation"] = rows.hold_out(splits["train"], keys, held_out)
    return Source(_chosen(given, splits, split))


def _rows_of(
    given: dict[str, Paths], files: dict[str, list[pathlib.Path]], large: _Rows, split: str, held_out: float
) -> Source:
    """Return examples that are made of rows as they are asked for."""
    names = [*files, *(["validation"] if held_out else [])]
    origin = "train" if held_out and split == "validation" else split
    _chosen(given, dict.fromkeys(names), split)
    found = row_access.Rows(tuple(files[origin]), large.columns)
    if not len(found):
        raise UserError(f"{origin}: {_listed(given[origin])} holds no examples")
    chosen = None
    if held_out and origin == "train":
        order = np.random.default_rng(0).permutation(len(found))
        held = round(held_out * len(found))
        chosen = np.sort(order[:held] if split == "validation" else order[held:])
        if not 0 < held < len(found):
            raise UserError(f"held_out: {held_out} of {len(found)} rows leaves one of the two splits empty")
    return Source(row_access.Examples(found, large.make, chosen))


def _chosen(given: dict[str, Paths], splits: dict[str, Any], split: str) -> Any:
    if split not in splits:
        raise UserError(f"{_listed(given['train'])} has no split '{split}'{nearest(split, splits)}")
    return splits[split]


def _given(
    paths: dict[str, Paths | None], suffixes: Sequence[str]
) -> tuple[dict[str, Paths], dict[str, list[pathlib.Path]]]:
    """Return of each split that is given its paths, and the files that are meant."""
    given = {name: where for name, where in paths.items() if where}
    if "train" not in given:
        raise UserError("train: no file is given")
    return given, {name: _files(where, suffixes, name) for name, where in given.items()}


def _listed(paths: Paths) -> str:
    return ", ".join(f"'{path}'" for path in ([paths] if isinstance(paths, str) else paths))


def _files(paths: Paths, suffixes: Sequence[str], split: str) -> list[pathlib.Path]:
    """Return the files that are meant, those of a folder or a pattern in the order of their names."""
    files: list[pathlib.Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        pattern = pathlib.Path(path).expanduser()
        scheme, separator, _ = path.partition("://")
        if path.startswith(hub.SCHEME):
            some = hub.files(path, split, suffixes)
        elif glob.has_magic(path) and separator and storage.knows(scheme):
            some = [storage.fetch(file) for file in storage.match(path)]
        elif glob.has_magic(path) and not separator and not pattern.exists():
            some = [pathlib.Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
            some = [file for file in some if file.is_file()]
        else:
            place = assets.resolve(path)
            below = (file for file in place.rglob("*") if rows.suffix(file) in suffixes)
            some = sorted(below) if place.is_dir() else [place]
        if not some:
            raise UserError(f"'{path}' holds no file that ends in {', '.join(suffixes)}")
        files += some
    return files


def _plain(path: pathlib.Path, problems: list[str], unit: str) -> list[str]:
    """Return the documents of a file of plain text, with line feeds alone at the ends of lines."""
    whole = "".join(rows.lines(path, problems)).replace("\r\n", "\n")
    if unit == "line":
        return whole.split("\n")
    return [part.strip("\n") for part in re.split(r"\n\s*\n", whole)] if unit == "paragraph" else [whole]


def _table(
    path: pathlib.Path,
    problems: list[str],
    wanted: Sequence[str],
    example: Callable[[dict[str, Any]], Example],
    columns: Sequence[str] = (),
    quoted: bool | None = None,
) -> Iterator[Example]:
    """Yield what `example` makes of every row; a row of which it raises a ValueError is a bad one."""
    for number, row in rows.read(path, wanted, problems, columns, quoted):
        try:
            yield example(row)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")


def _document(row: dict[str, Any], field: str) -> Example:
    return {"text": rows.text(row, field)}


def _pair(row: dict[str, Any], source: str, target: str) -> Example:
    example = {"source": rows.text(row, source), "target": rows.text(row, target)}
    for name, column in (("source", source), ("target", target)):
        if not example[name].strip():
            raise ValueError(f"'{column}' is empty")
    return example


def _conversation(row: dict[str, Any], column: str) -> Example:
    """Return the messages of a row; a ValueError says what is wrong with them."""
    messages = rows.cell(row, column)
    if not isinstance(messages, list):
        raise ValueError(f"'{column}' is not a list of messages but {messages!r}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} has no text as its 'content'")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role '{role}'{nearest(str(role), ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's")
    return {"messages": messages}


def _preference(row: dict[str, Any], fields: Sequence[str]) -> Example:
    try:
        made = conversations(*(row.get(field) for field in fields))
    except UserError as error:  # of messages that are none
        raise ValueError(str(error)) from None
    return dict(zip(FIELDS, made))


def _prompt(example: Example) -> str:
    """Return what a conversation is up to the assistant's first message."""
    messages = example["messages"]
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return json.dumps([(message["role"], message["content"]) for message in messages[:first]])


def _questions(path: pathlib.Path, problems: list[str]) -> Iterator[Example]:
    try:
        articles = json.loads(path.read_bytes())["data"]
        passages = [(article.get("title", ""), passage) for article in articles for passage in article["paragraphs"]]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON at column {error.colno}: {error.msg}") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UserError(f"'{path}' is not as SQuAD's files are: {{'data': [{{'paragraphs': [...]}}]}}") from None
    seen: set[str] = set()
    for number, (title, passage) in enumerate(passages, start=1):
        if not isinstance(passage, dict) or not {"context", "qas"} <= set(passage):
            problems.append(f"{path}: passage {number} has no 'context' or no 'qas'")
            continue
        for question in passage["qas"]:
            try:
                example = _question(question, passage["context"])
                if example["id"] in seen:
                    raise ValueError("its id is there twice")
                seen.add(example["id"])
                yield {"title": title, **example}
            except ValueError as error:
                problems.append(f"{path}: question '{question.get('id')}' of passage {number}: {error}")


def _question(question: dict[str, Any], context: str) -> Example:
    answers = [] if question.get("is_impossible") else rows.cell(question, "answers")
    starts = [rows.cell(answer, "answer_start") for answer in answers]
    texts = [rows.text(answer, "text") for answer in answers]
    for start, answer in zip(starts, texts):
        if not isinstance(start, int) or context[start : start + len(answer)] != answer:
            raise ValueError(f"the answer '{answer}' is not at {start} of the context")
    return {
        "id": rows.text(question, "id"),
        "context": context,
        "question": rows.text(question, "question"),
        "answers": {"text": texts, "answer_start": starts},
    }
