"""Conversations as the examples of a causal language model that learns the answers only."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest


class Messages:
    """Make a conversation of an example's fields, by templates such as "Translate into German: {source}"."""

    def __init__(self, user: str, assistant: str = "", system: str = ""):
        """Take what each role says; a role that says nothing is left out.

        So is the answer where an example lacks a field that it is made of: the conversation is then a question.
        """
        self._templates = {"system": system, "user": user, "assistant": assistant}

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with the field `messages`."""
        messages = []
        for role, template in self._templates.items():
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
            missing = [field for field in fields if field not in example]
            if missing and role != "assistant":
                raise UserError(f"an example has no field '{missing[0]}'{nearest(missing[0], example)}")
            if template and not missing:
                messages.append({"role": role, "content": template.format_map(example)})
        return example | {"messages": messages}


class ChatTokens:
    """Instruction tuning: the loss is on what the assistant says (Touvron et al. 2023, Llama 2, 3.1).

    A conversation is rendered with the tokenizer's chat template, else in ChatML. Makes `input_ids`, `targets`
    (targets[t] is the token after input_ids[t]), int32 [T], `target_mask`, float32 [T], 1 where the target is of an
    answer or is the token that ends it, and `attention_mask`. Returns a list: the example, or nothing where the first
    `max_length` tokens hold no answer. A conversation without any answer is a question: it gets `input_ids` and
    `attention_mask` alone, up to where the answer begins, and keeps its end where it is too long.

    Attributes:
      max_length: conversations are cut after as many tokens.
      padding: what fills each feature up.
    """

    def __init__(self, tokenizer: Tokenizer, messages: str = "messages", max_length: int = 1024):
        """Read the field `messages`: a list of {"role": "user", "content": "Hello"}."""
        if max_length < 1:
            raise UserError(f"max_length: {max_length} is less than 1")
        self.messages, self.max_length = messages, max_length
        pad = tokenizer.pad_id
        self.padding = {"input_ids": pad, "targets": pad, "target_mask": 0, "attention_mask": 0}
        self._tokenizer = tokenizer

    def __call__(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the example with its features, or nothing."""
        messages = _messages(example, self.messages)
        if all(message["role"] != "assistant" for message in messages):
            return [example | question(self._tokenizer, messages, self.max_length)]
        made = learnt(self._tokenizer, messages, answer_spans(self._tokenizer, messages), self.max_length)
        return [example | made] if made["target_mask"].any() else []


def learnt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], answers: Sequence[tuple[int, int]], max_length: int
) -> dict[str, np.ndarray]:
    """Return `input_ids`, `targets`, `target_mask` and `attention_mask` of a conversation, at most `max_length` tokens.

    `answers` says where in its text, in characters, the targets count.
    """
    ids, offsets = encode(tokenizer, messages)
    tokens = np.array(ids[: max_length + 1], np.int32)
    begin, end = np.array(offsets[: max_length + 1], np.int64).reshape(-1, 2).T
    counts = np.zeros(len(tokens), bool)
    for first, last in answers:
        counts |= (end > first) & (begin < last)
    made = {"input_ids": tokens[:-1], "targets": tokens[1:], "target_mask": counts[1:].astype(np.float32)}
    return made | {"attention_mask": np.ones(len(tokens) - 1, np.int32)}


def question(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], max_length: int) -> dict[str, np.ndarray]:
    """Return `input_ids` and `attention_mask` up to where the answer begins, the last `max_length` tokens."""
    ids = encode(tokenizer, messages, add_generation_prompt=True)[0][-max_length:]
    return {"input_ids": np.array(ids, np.int32), "attention_mask": np.ones(len(ids), np.int32)}


def encode(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode a conversation as a model reads it.

    Special tokens of the template become tokens; those in a message are encoded as text, so that nobody can end a turn
    by typing its end.

    Returns:
      the ids, and where each stands in `tokenizer.chat(messages)`, in characters.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    start = 0
    for text, typed in _parts(tokenizer, messages, add_generation_prompt):
        backend = tokenizer.literal_backend if typed else tokenizer.backend
        encoding = backend.encode(text, add_special_tokens=False)
        ids += encoding.ids
        offsets += [(start + begin, start + end) for begin, end in encoding.offsets]
        start += len(text)
    return ids, offsets


def _parts(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> list[tuple[str, bool]]:
    """Return the text of a conversation in parts, and whether each is a special token that stands in a message."""
    contents = "".join(message["content"] for message in messages)
    special = "|".join(re.escape(token) for token in sorted(tokenizer.special_tokens, key=len, reverse=True))
    if not special or not re.search(special, contents):
        return [(tokenizer.chat(messages, add_generation_prompt), False)]
    mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in contents)  # for private use
    marked = [
        {**message, "content": re.sub(special, lambda found: f"{mark}{found[0]}{mark}", message["content"])}
        for message in messages
    ]
    parts = tokenizer.chat(marked, add_generation_prompt).split(mark)
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def answer_spans(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return where in the text of a conversation, in characters, each answer begins and ends, with what marks its end.

    Raises:
      UserError: the template renders a turn in another way when more follow, so that answers cannot be found.
    """
    text = tokenizer.chat(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, whole = tokenizer.chat(messages[:i], add_generation_prompt=True), tokenizer.chat(messages[: i + 1])
        if not (text.startswith(whole) and whole.startswith(before)):
            raise UserError(
                f"the chat template renders turn {i + 1} in another way when it is asked for than when it is read"
            )
        answer = whole[len(before) :]
        marked = answer.rstrip()  # the line break after <|im_end|> is the template's
        if marked.endswith(message["content"].rstrip()):  # nothing else marks the end
            marked = answer
        spans.append((len(before), len(before) + len(marked)))
    return spans


def check_messages(messages: Any, field: str = "messages") -> list[Mapping[str, Any]]:
    """Return the messages of a conversation, or raise UserError unless each has a role and a content, both text."""
    for message in messages if isinstance(messages, Sequence | np.ndarray) and len(messages) else [None]:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"'{field}' must be a list of messages that have a role and a content, both text")
    return list(messages)


def _messages(example: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    if field not in example:
        raise UserError(f"an example has no messages '{field}'{nearest(field, example)}")
    return check_messages(example[field], field)
