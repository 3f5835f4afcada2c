"""Incremental detokenisation with stop texts."""

import itertools
from collections.abc import Sequence

import numpy as np

from research.data.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoding of a stream of tokens.

    A possible beginning of a stop text or of a character is held back until it is complete.

    Attributes:
      ended: whether a stop text was reached; later tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        """Initialise after the tokens of `prompt`, which may decide whether the text begins with a space."""
        self.ended = False
        self._tokenizer, self._stop, self._ids = tokenizer, tuple(stop), [int(id) for id in prompt]
        # A special token, such as the end of a turn, does not appear in decoded text.
        self._ends = {tokenizer.backend.token_to_id(text) for text in stop} & (tokenizer.special_ids if stop else set())
        self._shown = len(tokenizer.decode(self._ids)) if self._ids else 0

    def add(self, tokens: Sequence[int]) -> str:
        """Add tokens and return the text that is final."""
        return self._advance(tokens, last=False)

    def close(self) -> str:
        """Return the text that was held back."""
        return self._advance((), last=True)

    def _advance(self, tokens: Sequence[int], last: bool) -> str:
        if self.ended:
            return ""
        ids = [int(id) for id in tokens]
        place = next((i for i, id in enumerate(ids) if id in self._ends), len(ids))
        self._ids.extend(ids[:place])
        last |= place < len(ids)
        text = self._tokenizer.decode(self._ids)
        # The stop text that completes first, as when tokens arrive one by one.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop, self._shown)) >= 0]
        self.ended = bool(found) or place < len(ids)
        end = min(found)[1] if found else len(text) if last else self._certain(text)
        new, self._shown = text[self._shown : end], max(self._shown, end)
        return new

    def _certain(self, text: str) -> int:
        """Return the length of the final part: an incomplete character is decoded as U+FFFD."""
        whole = text.rstrip("\ufffd")
        for size in range(max(map(len, self._stop), default=1) - 1, 0, -1):
            if any(stop.startswith(whole[-size:]) for stop in self._stop if len(stop) > size <= len(whole)):
                return len(whole) - size
        return len(whole)


def completion(
    tokenizer: Tokenizer | None,
    tokens: Sequence[int] | np.ndarray,
    stop: Sequence[str] = (),
    prompt: Sequence[int] = (),
) -> str:
    """Return the text of one output of `generate`: up to the end token, or to the first of the texts in `stop`.

    Without a tokenizer it is the token ids.
    """
    ids = [int(id) for id in tokens]
    if tokenizer is None:
        return " ".join(map(str, ids))
    ids = list(itertools.takewhile(lambda id: id not in tokenizer.end_ids, ids))
    detokenizer = Detokenizer(tokenizer, stop, prompt)
    return detokenizer.add(ids) + detokenizer.close()
