"""Preferences: a prompt, the answer that was chosen and the one that was rejected, as token features side by side."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from research.data.chat import answer_spans, check_messages, learnt, question
from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest

FIELDS = ("prompt", "chosen", "rejected")
Messages = list[Mapping[str, Any]]


class ClassPreference:
    """Make a preference of an example's class: an answer for it is chosen, the one for the class after it rejected."""

    def __init__(self, prompt: str, answers: Sequence[str], label: str = "label"):
        """Take a template such as "Is this good? {text}", an answer for each class, and the field of the class."""
        if len(set(answers)) < max(len(answers), 2):
            raise UserError(f"answers: {tuple(answers)} must be two or more, and different")
        self._prompt, self._answers, self._label = prompt, tuple(answers), label

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with the fields `prompt`, `chosen` and `rejected`; without a class, a question."""
        try:
            made = {"prompt": self._prompt.format_map(example)}
        except KeyError as error:
            raise UserError(f"an example has no field '{error.args[0]}'{nearest(error.args[0], example)}") from None
        if self._label not in example:
            return example | made
        label = int(example[self._label])
        if not 0 <= label < len(self._answers):
            raise UserError(f"answers: there are {len(self._answers)}, and an example has the class {label}")
        rejected = self._answers[(label + 1) % len(self._answers)]
        return example | made | {"chosen": self._answers[label], "rejected": rejected}


class PreferenceTokens:
    """Make the features of both answers to a prompt, with the loss on the answers alone.

    Conversations are rendered as by `chat.ChatTokens`. Makes `input_ids`, `targets`, `target_mask` and
    `attention_mask` of the prompt with the chosen answer, and the same with "rejected_" before the names of the
    prompt with the rejected one. Returns a list: the example, or nothing where the first `max_length` tokens of either
    hold no answer. An example without answers is a question: it gets `input_ids` and `attention_mask` alone.

    Attributes:
      max_length: conversations are cut after as many tokens.
      padding: what fills each feature up.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int = 1024):
        """Read the fields `prompt`, `chosen` and `rejected`, in any form that `conversations` takes."""
        if max_length < 1:
            raise UserError(f"max_length: {max_length} is less than 1")
        self.max_length, self._tokenizer = max_length, tokenizer
        pad = tokenizer.pad_id
        own = {"input_ids": pad, "targets": pad, "target_mask": 0, "attention_mask": 0}
        self.padding = own | {f"rejected_{name}": fill for name, fill in own.items()}

    def __call__(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the example with its features, or nothing."""
        if not any(name in example for name in FIELDS[1:]):
            if "prompt" not in example:
                raise UserError(f"an example has no 'prompt'{nearest('prompt', example)}")
            return [example | question(self._tokenizer, _as_messages(example["prompt"], "user"), self.max_length)]
        try:
            prompt, *answers = conversations(*(example.get(name) for name in FIELDS))
        except ValueError as error:
            raise UserError(f"an example is no preference: {error}") from None
        chosen, rejected = (self._side(prompt, answer) for answer in answers)
        if not (chosen["target_mask"].any() and rejected["target_mask"].any()):
            return []
        return [example | chosen | {f"rejected_{name}": value for name, value in rejected.items()}]

    def _side(self, prompt: Messages, answer: Messages) -> dict[str, Any]:
        messages, turns = [*prompt, *answer], sum(message["role"] == "assistant" for message in answer)
        return learnt(self._tokenizer, messages, answer_spans(self._tokenizer, messages)[-turns:], self.max_length)


def conversations(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Return a preference as messages: what both answers have in common, and how each of them goes on.

    Args:
      prompt: a text, which is the user's turn, or a list of messages; not looked at where the answers begin with a
        turn other than the assistant's, and are whole conversations.
      chosen: a text, which is the assistant's turn, or a list of messages.
      rejected: alike.

    Raises:
      ValueError: something is missing, both answers are the same, or one does not begin and end with the assistant.
    """
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None or len(value) == 0:
            raise ValueError(f"'{name}' is empty")
    sides = [_as_messages(chosen, "assistant", "chosen"), _as_messages(rejected, "assistant", "rejected")]
    if any(side[0]["role"] != "assistant" for side in sides):
        common = [a for a, b in itertools.takewhile(lambda pair: _same(*pair), zip(*sides))]
        sides = [side[len(common) :] for side in sides]
    elif prompt is None or len(prompt) == 0:
        raise ValueError("'prompt' is empty")
    else:
        common = _as_messages(prompt, "user", "prompt")
    if len(sides[0]) == len(sides[1]) and all(map(_same, *sides)):
        raise ValueError("'chosen' and 'rejected' are the same")
    if not common:
        raise ValueError("'chosen' and 'rejected' have no prompt in common")
    for name, side in zip(FIELDS[1:], sides):
        if not side or side[0]["role"] != "assistant" or side[-1]["role"] != "assistant":
            raise ValueError(f"what follows the prompt in '{name}' does not begin and end with the assistant's turn")
    return common, sides[0], sides[1]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["role"] == other["role"] and one["content"] == other["content"]


def _as_messages(value: str | Sequence[Any], role: str, name: str = "prompt") -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else check_messages(value, name)
