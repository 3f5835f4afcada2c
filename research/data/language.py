"""Text as the examples of language models: causal, masked, span corruption, prefix, and one sequence to another.

Each op says which features it makes; all are [T], int32 but for `target_mask`, which is float32. Those that cut
documents return lists. The text is encoded as it is: what begins and ends it is added here.
"""

from typing import Any

import numpy as np

from research.data.spans import (
    PIECE,
    corrupted_lengths,
    corrupted_sides,
    noise_counts,
    partition,
    pieces,
    without_piece,
)
from research.data.text import text_of
from research.data.tokenizer import Tokenizer
from research.errors import UserError

Example = dict[str, Any]


class Texts:
    """Each of several texts of an example as an example of its own: the sides of pairs, to pretrain on them singly."""

    def __init__(self, fields: tuple[str, ...], into: str = "text"):
        """Read the texts in `fields` and write each to the field `into`."""
        if not fields:
            raise UserError("fields: there are none")
        self.fields, self.into = fields, into

    def __call__(self, example: Example) -> list[Example]:
        """Return as many examples as there are fields."""
        return [{self.into: text_of(example, field)} for field in self.fields]


class CausalTokens:
    """Next-token prediction over whole documents (Radford et al. 2018, equation 1).

    Makes `input_ids`, `targets` (targets[t] is the token after input_ids[t]), `target_mask`, `attention_mask`, and on
    demand `target_bytes`: how many bytes of the document each target stands for, so that the sums of loss and bytes
    give bits per byte for any tokenizer. Returns a list: a document's pieces, none of an empty one.

    Attributes:
      max_length: the most tokens of a piece; None leaves documents whole, for rows that are packed.
      padding: what fills each feature up.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        field: str = "text",
        max_length: int | None = None,
        bos: bool = True,
        eos: bool = True,
        target_bytes: bool = False,
    ):
        """Read the text in `field`.

        Args:
          tokenizer: bos_id begins a document, or eos_id where there is none, as in GPT-2; eos_id ends it.
          field: of the text.
          max_length: longer documents are cut; the pieces have every target once, and a piece begins with the last
            target of the one before.
          bos: whether there is a token before the first one, which is then predicted as well.
          eos: whether the end is predicted.
          target_bytes: whether to make that feature.
        """
        begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        self._bos = _token(begin, "bos: the tokenizer has no token that begins a text; set bos=False") if bos else None
        self._eos = _token(tokenizer.eos_id, "eos: the tokenizer has no such token; set eos=False") if eos else None
        if target_bytes and not bos:
            raise UserError("target_bytes: they are a document's only if its first token is predicted, with bos=True")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length: {max_length} is less than 1")
        self.field, self.max_length, self.target_bytes = field, max_length, target_bytes
        fills = {"targets": tokenizer.pad_id, "target_mask": 0, "attention_mask": 0, "target_bytes": 0}
        self.padding = {"input_ids": tokenizer.pad_id} | fills
        if not target_bytes:
            del self.padding["target_bytes"]
        self._backend = tokenizer.backend

    def __call__(self, example: Example) -> list[Example]:
        """Return the pieces of one document."""
        text = text_of(example, self.field)
        encoding = self._backend.encode(text, add_special_tokens=False)
        if not encoding.ids:
            return []
        first = [] if self._bos is None else [self._bos]
        last = [] if self._eos is None else [self._eos]
        tokens = np.array([*first, *encoding.ids, *last], np.int32)
        whole = {
            "input_ids": tokens[:-1],
            "targets": tokens[1:],
            "target_mask": np.ones(len(tokens) - 1, np.float32),
            "attention_mask": np.ones(len(tokens) - 1, np.int32),
        }
        if self.target_bytes:
            sizes = token_bytes(text, np.array(encoding.offsets, np.int64))
            whole["target_bytes"] = np.append(sizes, np.zeros(len(last), np.int32))
        length = self.max_length or max(len(tokens), 1)
        starts = range(0, len(tokens) - 1, length)
        return [example | {name: x[start : start + length] for name, x in whole.items()} for start in starts]


class Pieces:
    """Documents as pieces that are framed as the tokenizer frames a text, for masked language models.

    Makes `input_ids`, `attention_mask`, `token_type_ids` and `words`: the number of the word that a token is of, -1 at
    the frame. Returns a list.

    Attributes:
      max_length: the most tokens of a piece, the frame included.
      padding: what fills each feature up.
    """

    def __init__(self, tokenizer: Tokenizer, field: str = "text", max_length: int = 128):
        """Read the text in `field`."""
        self.field, self.max_length = field, max_length
        self.padding = {"input_ids": tokenizer.pad_id, "attention_mask": 0, "token_type_ids": 0, "words": -1}
        self._backend = tokenizer.backend
        framed = self._backend.encode("a")
        inside = np.flatnonzero(np.array(framed.special_tokens_mask) == 0)
        self._frame = framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]
        self._room = max_length - sum(map(len, self._frame))
        if self._room < 1:
            raise UserError(f"max_length: {max_length} has no room for text beside the tokenizer's special tokens")

    def __call__(self, example: Example) -> list[Example]:
        """Return the pieces of one document."""
        encoding = self._backend.encode(text_of(example, self.field), add_special_tokens=False)
        words = [-1 if word is None else word for word in encoding.word_ids]
        pieces = []
        for start in range(0, len(encoding.ids), self._room):
            end = start + self._room
            ids = np.array([*self._frame[0], *encoding.ids[start:end], *self._frame[1]], np.int32)
            framed = np.array([-1] * len(self._frame[0]) + words[start:end] + [-1] * len(self._frame[1]), np.int32)
            ones, zeros = np.ones_like(ids), np.zeros_like(ids)
            made = {"input_ids": ids, "attention_mask": ones, "token_type_ids": zeros, "words": framed}
            pieces.append(example | made)
        return pieces


class MaskTokens:
    """Hides tokens for masked language models: BERT's 80/10/10 (Devlin et al. 2018, 3.1), anew whenever it is drawn.

    Of the tokens that are no special ones a share is chosen, rounded, and at least one; of the chosen ones 80 % become
    the mask token, 10 % any ordinary token, and 10 % stay. Makes `targets` (the original ids) and `target_mask` (1 at
    the chosen ones), and changes `input_ids`. In a text that holds mask tokens already, those are the chosen ones: they
    are what a prediction is asked for.

    Attributes:
      padding: what fills each feature up.
    """

    def __init__(self, tokenizer: Tokenizer, share: float = 0.15, whole_word: bool = False):
        """Take examples that have `input_ids`.

        Args:
          tokenizer: has a mask token.
          share: of the tokens that are chosen.
          whole_word: whether all tokens of a word are chosen together; needs `words`, which Pieces makes. A word that
            would exceed the share is left out, unless it is the first.
        """
        if not 0 < share < 1:
            raise UserError(f"share: {share} is not between 0 and 1")
        self._mask = _token(tokenizer.mask_id, "the tokenizer has no mask token")
        self.share, self.whole_word = share, whole_word
        self.padding = {"targets": tokenizer.pad_id, "target_mask": 0}
        self._special = np.array(sorted(tokenizer.special_ids))
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), self._special)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example with some of its tokens hidden."""
        targets = np.asarray(example["input_ids"], np.int32)
        input_ids = targets.copy()
        chosen = np.flatnonzero(targets == self._mask)
        candidates = np.flatnonzero(~np.isin(targets, self._special))
        if not len(chosen) and len(candidates):
            chosen = self._choose(candidates, example, rng)
            draws = rng.random(len(chosen))
            replaced = np.where(draws < 0.8, self._mask, rng.choice(self._ordinary, len(chosen)))
            input_ids[chosen] = np.where(draws < 0.9, replaced, targets[chosen])
        mask = np.zeros(len(targets), np.float32)
        mask[chosen] = 1
        return example | {"input_ids": input_ids, "targets": targets, "target_mask": mask}

    def _choose(self, candidates: np.ndarray, example: Example, rng: np.random.Generator) -> np.ndarray:
        count = max(1, round(self.share * len(candidates)))
        if not self.whole_word:
            return rng.choice(candidates, count, replace=False)
        if "words" not in example:
            raise UserError("whole_word: the examples have no 'words'; research.data.language.Pieces makes them")
        words = np.asarray(example["words"])[candidates]
        order = rng.permutation(np.unique(words))
        sizes = np.array([np.count_nonzero(words == word) for word in order])
        taken: list[int] = []
        total = 0
        for word, size in zip(order, sizes):
            if not taken or total + size <= count:
                taken.append(word)
                total += size
        return candidates[np.isin(words, taken)]


class SpanCorruption:
    """Fill-in-the-gap for encoder-decoders, as T5 was pretrained (Raffel et al. 2019, 3.1.4).

    Random spans of a piece of text are taken out. The input has <extra_id_0>, <extra_id_1>, ... where they were; the
    target has them one after the other, each after its <extra_id>; both end with eos. Makes `input_ids`,
    `attention_mask`, `decoder_input_ids`, `decoder_attention_mask`, `targets` and `target_mask`. Returns a list: a
    document's pieces, but for a last one of a single token.

    Attributes:
      prepared: the sequence that is made of a document before anything is drawn.
      max_length: the length of inputs; a document is cut into pieces of the length that fills it.
      decoder_max_length: the length of targets that follows.
      padding: what fills each feature up.
    """

    prepared = PIECE

    def __init__(
        self,
        tokenizer: Tokenizer,
        field: str = "text",
        max_length: int = 512,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        decoder_start_id: int | None = None,
    ):
        """Read the text in `field`.

        Args:
          tokenizer: has eos and enough <extra_id_i>.
          field: of the text.
          max_length: of the input, with its <extra_id_i> and eos.
          noise_density: the share of tokens that are taken out.
          mean_span_length: in tokens.
          decoder_start_id: what `decoder_input_ids` begin with; None takes the padding token, as T5 does.
        """
        if not 0 < noise_density < 1 or mean_span_length < 1:
            raise UserError(f"noise_density: {noise_density} is not between 0 and 1, or {mean_span_length} less than 1")
        self._noise = noise_density, mean_span_length
        self.length, self.decoder_max_length = corrupted_lengths(max_length, *self._noise)
        self.field, self.max_length = field, max_length
        self._eos = _token(tokenizer.eos_id, "the tokenizer has no eos token")
        self._sentinels = np.array(tokenizer.sentinels, np.int32)
        _, spans = noise_counts(self.length, *self._noise)
        if len(self._sentinels) < spans:
            raise UserError(
                f"max_length: {max_length} asks for {spans} tokens <extra_id_i>, the tokenizer has "
                f"{len(self._sentinels)}; the ones of research.data.tokenizer take `sentinels={spans}`"
            )
        self._sides = _Sides(tokenizer, tokenizer, decoder_start_id)
        self.padding = self._sides.padding
        self._backend = tokenizer.backend

    def __call__(self, example: Example, rng: np.random.Generator) -> list[Example]:
        """Return the pieces of one document, corrupted."""
        return [self.draw(piece, rng) for piece in self.prepare(example)]

    def prepare(self, example: Example) -> list[Example]:
        """Return the pieces of one document, whose tokens are its `piece`."""
        ids = np.array(self._backend.encode(text_of(example, self.field), add_special_tokens=False).ids, np.int32)
        return pieces(example, ids, self.length)

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Return a piece, corrupted."""
        return without_piece(example) | self._corrupt(example[PIECE], rng)

    def extents(self, length: int) -> tuple[int, int]:
        """Return how long the input and the target of a piece of `length` tokens are."""
        return corrupted_sides(length, *self._noise)

    def _corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
        noise, spans = noise_counts(len(ids), *self._noise)
        lengths = np.empty(2 * spans, np.int64)
        lengths[::2] = partition(len(ids) - noise, spans, rng)  # text and spans take turns; text begins
        lengths[1::2] = partition(noise, spans, rng)
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        sentinels = [self._sentinels[i : i + 1] for i in range(spans)]
        end = np.array([self._eos], np.int32)
        inputs = [part for pair in zip(parts[::2], sentinels) for part in pair]
        targets = [part for pair in zip(sentinels, parts[1::2]) for part in pair]
        return self._sides.encoder(np.concatenate([*inputs, end])) | self._sides.decoder(
            np.concatenate([*targets, end])
        )


class PrefixLM:
    """Go on with a text, for encoder-decoders (Raffel et al. 2019, 3.2.3 and 3.3.1).

    A piece of text is split at a place that is as likely anywhere between its tokens: the encoder reads what comes
    before, the decoder goes on. Both end with eos. The features are those of SpanCorruption. Returns a list: a
    document's pieces, but for a last one of a single token.

    Attributes:
      prepared: the sequence that is made of a document before anything is drawn.
      max_length: the most tokens of either side; pieces have as many.
      decoder_max_length: the same.
      padding: what fills each feature up.
    """

    prepared = PIECE

    def __init__(
        self, tokenizer: Tokenizer, field: str = "text", max_length: int = 512, decoder_start_id: int | None = None
    ):
        """Read the text in `field`; `decoder_start_id` is as in SpanCorruption."""
        if max_length < 2:
            raise UserError(f"max_length: {max_length} is less than 2")
        self.field, self.max_length, self.decoder_max_length = field, max_length, max_length
        self._eos = _token(tokenizer.eos_id, "the tokenizer has no eos token")
        self._sides = _Sides(tokenizer, tokenizer, decoder_start_id)
        self.padding = self._sides.padding
        self._backend = tokenizer.backend

    def __call__(self, example: Example, rng: np.random.Generator) -> list[Example]:
        """Return the pieces of one document, each split in two."""
        return [self.draw(piece, rng) for piece in self.prepare(example)]

    def prepare(self, example: Example) -> list[Example]:
        """Return the pieces of one document, whose tokens are its `piece`."""
        ids = np.array(self._backend.encode(text_of(example, self.field), add_special_tokens=False).ids, np.int32)
        return pieces(example, ids, self.max_length)

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Return a piece, split in two."""
        piece = example[PIECE]
        split = int(rng.integers(1, len(piece)))
        sides = [np.array([*side, self._eos], np.int32) for side in (piece[:split], piece[split:])]
        return without_piece(example) | self._sides.encoder(sides[0]) | self._sides.decoder(sides[1])

    def extents(self, length: int, rng: np.random.Generator) -> tuple[int, int]:
        """Return how long both sides of a piece of `length` tokens are, drawn as `draw` does."""
        split = int(rng.integers(1, length))
        return split + 1, length - split + 1


class Seq2Seq:
    """One text to another: translation, summarisation, or anything that is written as such (Raffel et al. 2019, 2.4).

    Both texts end with eos, and are cut before it where they are too long. Makes `input_ids` and `attention_mask`, and
    of examples that have a target `decoder_input_ids`, `decoder_attention_mask`, `targets` and `target_mask`.

    Attributes:
      max_length: the most tokens of the source.
      decoder_max_length: the most tokens of the target.
      padding: what fills each feature up.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str = "source",
        target: str = "target",
        max_length: int = 128,
        decoder_max_length: int = 128,
        prefix: str = "",
        target_tokenizer: Tokenizer | None = None,
        decoder_start_id: int | None = None,
    ):
        """Read the texts in the fields `source` and `target`.

        Args:
          tokenizer: of the source.
          source: the field of what is read.
          target: the field of what is to be written; predictions need none.
          max_length: of the source, with the prefix and eos.
          decoder_max_length: of the target, with eos.
          prefix: what comes before every source, such as "translate English to German: ".
          target_tokenizer: of the target; None takes the source's.
          decoder_start_id: what `decoder_input_ids` begin with; None takes the target's padding token, as T5 and
            Marian do.
        """
        for name, value in (("max_length", max_length), ("decoder_max_length", decoder_max_length)):
            if value < 1:
                raise UserError(f"{name}: {value} is less than 1")
        self.source, self.target, self.prefix = source, target, prefix
        self.max_length, self.decoder_max_length = max_length, decoder_max_length
        self._tokenizers = tokenizer, target_tokenizer or tokenizer
        self._eos = [_token(t.eos_id, "the tokenizer has no eos token") for t in self._tokenizers]
        self._sides = _Sides(*self._tokenizers, decoder_start_id)
        self.padding = self._sides.padding

    def __call__(self, example: Example) -> Example:
        """Return the example with its features."""
        made = self._sides.encoder(self._encode(0, self.prefix + text_of(example, self.source), self.max_length))
        if self.target in example:
            targets = self._encode(1, text_of(example, self.target), self.decoder_max_length)
            made |= self._sides.decoder(targets)
        return example | made

    def _encode(self, side: int, text: str, max_length: int) -> np.ndarray:
        ids = self._tokenizers[side].backend.encode(text, add_special_tokens=False).ids
        return np.array([*ids[: max_length - 1], self._eos[side]], np.int32)


class _Sides:
    """The features of an encoder-decoder."""

    def __init__(self, encoder: Tokenizer, decoder: Tokenizer, decoder_start_id: int | None):
        self._start = decoder.pad_id if decoder_start_id is None else decoder_start_id
        self.padding = {"input_ids": encoder.pad_id, "attention_mask": 0, "decoder_input_ids": decoder.pad_id}
        self.padding |= {"targets": decoder.pad_id, "target_mask": 0, "decoder_attention_mask": 0}

    def encoder(self, input_ids: np.ndarray) -> Example:
        return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}

    def decoder(self, targets: np.ndarray) -> Example:
        return {
            "decoder_input_ids": np.append(np.int32(self._start), targets[:-1]).astype(np.int32),
            "decoder_attention_mask": np.ones_like(targets),
            "targets": targets,
            "target_mask": np.ones(len(targets), np.float32),
        }


def token_bytes(text: str, offsets: np.ndarray) -> np.ndarray:
    """Return how many bytes of UTF-8 each token stands for, int32 [T]; together as many as the text has.

    Args:
      text: that was encoded.
      offsets: of the tokens [T, 2], T > 0, in characters. What no token covers counts with the token after it, at the
        end with the last one. The bytes of a character that became several tokens are shared out, the first ones first.
    """
    widths = [0, *(len(character.encode("utf-8", "surrogatepass")) for character in text)]
    position = np.cumsum(widths)
    ends = np.maximum.accumulate(offsets[:, 1])
    ends[ends == ends[-1]] = len(text)
    _, first, counts = np.unique(ends, return_index=True, return_counts=True)
    groups = np.diff(position[ends[first]], prepend=0)  # the bytes of the tokens that end at the same character
    rank = np.arange(len(ends)) - np.repeat(first, counts)
    share, rest = np.divmod(groups, counts)
    return (np.repeat(share, counts) + (rank < np.repeat(rest, counts))).astype(np.int32)


def _token(id: int | None, problem: str) -> int:
    if id is None:
        raise UserError(problem)
    return id
