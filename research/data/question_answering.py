"""Questions about a passage, as windows of tokens that a model can hold."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest


class Windows:
    """Makes a list of windows of one question and its passage: the whole question, and a part of the passage.

    Every window is the example with int32 `input_ids`, `attention_mask`, `token_type_ids` and `context_mask` (1 at the
    passage's tokens) [T]; `window`, its number; and, for who reads the answer, `passage`, the text, and `offsets`
    [T, 2], the characters of it that a token stands for. Where the example has answers, each has also `start` and
    `end`, the first and the last token of the first answer, or 0 and 0, the token before the question, where the answer
    is not whole inside the window or there is none.

    Attributes:
      max_length: the most tokens that a window has.
      padding: what fills each feature up to the length of its batch.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        max_length: int = 384,
        stride: int = 128,
        max_question_length: int = 64,
    ):
        """Name the fields; `answers` holds the lists `text` and `answer_start`, in characters, as SQuAD's does.

        Args:
          tokenizer: its first token of a pair must be a special one.
          question: the field of the question.
          context: the field of the passage.
          answers: the field of the answers; an example need not have it.
          max_length: tokens of a window, special ones included.
          stride: tokens of the passage that a window shares with the next one.
          max_question_length: tokens after which a question is cut off.
        """
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.no_truncation()
        least = max_length - max_question_length - self._backend.num_special_tokens_to_add(True)
        if not 0 <= stride < least:
            raise UserError(
                f"stride: {stride} must be at least 0 and less than the {least} tokens that max_length {max_length} "
                f"leaves beside a question of max_question_length {max_question_length}"
            )
        if max_question_length < 1:
            raise UserError(f"max_question_length: {max_question_length} must be at least 1")
        if self._backend.encode("a", "a").special_tokens_mask[0] != 1:
            raise UserError("tokenizer: it puts no special token first, which is to stand for 'no answer'")
        self.fields = (question, context)
        self.answers = answers
        self.max_length = max_length
        self.stride = stride
        self.max_question_length = max_question_length
        self.padding = {"input_ids": tokenizer.pad_id, "attention_mask": 0, "token_type_ids": 0, "context_mask": 0}

    def __call__(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the windows, in the order of the passage; at least one.

        Raises:
          UserError: the question or the passage is missing, or the answer does not stand where the example says.
        """
        for field in self.fields:
            if not isinstance(example.get(field), str):
                raise UserError(f"an example has no text '{field}'{nearest(field, example)}")
        question, context = (example[field] for field in self.fields)
        encoding = self._backend.encode(question, context)
        columns = {
            "input_ids": np.asarray(encoding.ids, np.int32),
            "attention_mask": np.asarray(encoding.attention_mask, np.int32),
            "token_type_ids": np.asarray(encoding.type_ids, np.int32),
        }
        sequence = np.asarray([-1 if number is None else number for number in encoding.sequence_ids])
        columns["context_mask"] = (sequence == 1).astype(np.int32)
        columns["offsets"] = np.where(sequence[:, None] == 1, np.asarray(encoding.offsets, np.int32), 0)
        answer = self._answer(example, columns["offsets"])
        windows = []
        for number, kept in enumerate(self._parts(sequence)):
            window: dict[str, Any] = {name: column[kept] for name, column in columns.items()}
            window |= {"window": np.int32(number), "passage": context}
            if answer is not None:
                whole = all(token in kept for token in answer)
                start, end = np.searchsorted(kept, answer) if whole else (0, 0)
                window |= {"start": np.int32(start), "end": np.int32(end)}
            windows.append(example | window)
        return windows

    def _parts(self, sequence: np.ndarray) -> list[np.ndarray]:
        """Return the tokens that each window keeps, ascending; `sequence` is 0 at the question, 1 at the passage."""
        frame = np.setdiff1d(np.flatnonzero(sequence != 1), np.flatnonzero(sequence == 0)[self.max_question_length :])
        passage = np.flatnonzero(sequence == 1)
        room = self.max_length - len(frame)
        last = max(len(passage) - self.stride, 1)  # a part that began here would be inside the one before it
        return [np.sort(np.r_[frame, passage[i : i + room]]) for i in range(0, last, room - self.stride)]

    def _answer(self, example: Mapping[str, Any], offsets: np.ndarray) -> tuple[int, int] | None:
        """Return the first and the last token of the answer; (0, 0) where there is none, None if nothing is known."""
        if self.answers not in example:
            return None
        answers = example[self.answers]
        if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
            raise UserError(f"'{self.answers}' is not the two lists 'text' and 'answer_start'")
        texts, starts = answers["text"], answers["answer_start"]
        if not len(texts):
            return 0, 0
        text, begin, context = str(texts[0]), int(starts[0]), example[self.fields[1]]
        end = begin + len(text)
        if begin < 0 or context[begin:end] != text:
            raise UserError(f"'{self.answers}': '{text}' does not stand at character {begin} of '{context[:40]}...'")
        tokens = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))
        return (int(tokens[0]), int(tokens[-1])) if len(tokens) else (0, 0)
