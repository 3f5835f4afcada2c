"""Tokens back to text, as they come."""

from collections.abc import Sequence

import numpy as np

from research.data.tokenizer import Tokenizer


class Detokenizer:
    """The text of tokens as they come.

    What may be the beginning of a stop text, or of a character, is held back until it is known.

    Attributes:
      ended: whether a stop text came; nothing is added after it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        """Begin after the tokens of `prompt`, which may decide whether the text begins with a space."""
        self.ended = False
        self._tokenizer, self._stop, self._ids = tokenizer, tuple(stop), [int(id) for id in prompt]
        # A special token, such as the end of a turn, is no text: it is never found in what is decoded.
        self._ends = {tokenizer.backend.token_to_id(text) for text in stop} & (tokenizer.special_ids if stop else set())
        self._shown = len(tokenizer.decode(self._ids)) if self._ids else 0

    def add(self, tokens: Sequence[int]) -> str:
        """Take tokens and return the text that is certain by now."""
        return self._advance(tokens, last=False)

    def close(self) -> str:
        """Return what was held back."""
        return self._advance((), last=True)

    def _advance(self, tokens: Sequence[int], last: bool) -> str:
        if self.ended:
            return ""
        ids = [int(id) for id in tokens]
        place = next((i for i, id in enumerate(ids) if id in self._ends), len(ids))
        self._ids.extend(ids[:place])
        last |= place < len(ids)
        text = self._tokenizer.decode(self._ids)
        # Of several the one that is whole first, as when tokens come one by one.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop, self._shown)) >= 0]
        self.ended = bool(found) or place < len(ids)
        end = min(found)[1] if found else len(text) if last else self._certain(text)
        new, self._shown = text[self._shown : end], max(self._shown, end)
        return new

    def _certain(self, text: str) -> int:
        """Return how much of the text no further token changes: half a character is decoded as U+FFFD."""
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

    Where there is no tokenizer it is the tokens' numbers.
    """
    ids = [int(id) for id in tokens]
    if tokenizer is None:
        return " ".join(map(str, ids))
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    detokenizer = Detokenizer(tokenizer, stop, prompt)
    return detokenizer.add(ids) + detokenizer.close()
