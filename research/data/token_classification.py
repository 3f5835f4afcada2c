"""Words with labels, as tokens of which the first of every word carries its word's label."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest


class AlignLabels:
    """Encodes a list of words, joined by spaces, and puts their labels at the first token of each.

    Adds int32 `input_ids`, `attention_mask`, `token_type_ids` and `target_mask` (1 at the first token of every word)
    [T]; where the example has labels `targets` [T], those of the words, 0 at the other tokens; and, for who reads the
    labels, `words` and `first_tokens`, where each begins, -1 where `max_length` or the tokenizer left nothing of it.

    Attributes:
      label_field: whose class names are those of the labels.
      max_length: the most tokens that an example has.
      padding: what fills each feature up to the length of its batch.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: str = "tokens", labels: str = "ner", max_length: int = 256):
        """Name the fields; `labels` holds a class number a word, and an example need not have it."""
        self.tokens = tokens
        self.label_field = labels
        self.max_length = max_length
        self.padding = {"input_ids": tokenizer.pad_id} | dict.fromkeys(
            ("attention_mask", "token_type_ids", "target_mask", "targets"), 0
        )
        self._backend = tokenizer.truncated(max_length).backend

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with the features.

        Raises:
          UserError: the words are missing, or there are not as many labels.
        """
        words = example.get(self.tokens)
        if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(w, str) for w in words):
            raise UserError(f"an example has no list of words '{self.tokens}'{nearest(self.tokens, example)}")
        encoding = self._backend.encode(" ".join(words))
        first_tokens = _first_tokens(words, encoding)
        kept = first_tokens >= 0
        target_mask = np.zeros(len(encoding.ids), np.int32)
        target_mask[first_tokens[kept]] = 1
        features: dict[str, Any] = {
            "input_ids": np.asarray(encoding.ids, np.int32),
            "attention_mask": np.asarray(encoding.attention_mask, np.int32),
            "token_type_ids": np.asarray(encoding.type_ids, np.int32),
            "target_mask": target_mask,
            "first_tokens": first_tokens,
            "words": list(words),
        }
        if self.label_field in example:
            labels = np.asarray(example[self.label_field])
            if len(labels) != len(words):
                raise UserError(f"'{self.label_field}' has {len(labels)} labels for {len(words)} words")
            if len(labels) and labels.dtype.kind not in "iu":
                raise UserError(f"'{self.label_field}' holds {labels[0]!r}, not the number of a class")
            features["targets"] = np.zeros(len(encoding.ids), np.int32)
            features["targets"][first_tokens[kept]] = labels[kept]
        return example | features


def _first_tokens(words: Sequence[str], encoding: tokenizers.Encoding) -> np.ndarray:
    """Return int32 [words]: the first token that holds some of a word joined to the others by spaces, or -1."""
    ends = np.cumsum([len(word) + 1 for word in words], dtype=int) - 1
    starts = ends - [len(word) for word in words]
    inside = np.flatnonzero(np.asarray(encoding.special_tokens_mask) == 0)
    spans = np.asarray(encoding.offsets, int).reshape(-1, 2)[inside]
    found = []
    for start, end in zip(starts, ends):
        token = int(np.searchsorted(spans[:, 1], start, side="right"))  # the first that ends after `start`
        found.append(inside[token] if token < len(spans) and spans[token, 0] < end else -1)
    return np.asarray(found, np.int32)
