"""Tokenisation of text examples for an encoder."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest


def text_of(example: Mapping[str, Any], field: str) -> str:
    """Return the text in a field of an example."""
    if field not in example:
        raise UserError(f"an example has no text field '{field}'{nearest(field, example)}")
    if not isinstance(example[field], str):
        raise UserError(f"an example's field '{field}' must be text, not {type(example[field]).__name__}")
    return example[field]


class Tokenize:
    """Adds input_ids, attention_mask and token_type_ids, int32 [T], with special tokens and unpadded.

    Attributes:
      max_length: the maximum number of tokens of an example.
      padding: the padding value of each feature.
    """

    def __init__(self, tokenizer: Tokenizer, fields: tuple[str, ...] = ("text",), max_length: int = 128):
        """Initialise for one text field or a pair of them."""
        if len(fields) not in (1, 2):
            raise UserError(f"Tokenize takes one field or a pair of fields, not {fields}")
        self.fields = fields
        self.max_length = max_length
        self.padding = {"input_ids": tokenizer.pad_id, "attention_mask": 0, "token_type_ids": 0}
        self._backend = tokenizer.truncated(max_length).backend

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with the three features."""
        texts = [text_of(example, field) for field in self.fields]
        encoding = self._backend.encode(texts[0], texts[1] if len(texts) == 2 else None)
        return example | {
            "input_ids": np.asarray(encoding.ids, np.int32),
            "attention_mask": np.asarray(encoding.attention_mask, np.int32),
            "token_type_ids": np.asarray(encoding.type_ids, np.int32),
        }
