"""Tokenizers trained on the user's text, by Hugging Face's `tokenizers`."""

import collections
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from research.data.dataset import Source
from research.data.tokenizer import Tokenizer, add_sentinels, bert_frame
from research.errors import UserError, nearest

KINDS = ("bpe", "wordpiece", "unigram")


ALPHABET = 1000  # the most characters that a WordPiece vocabulary begins with, as in BERT's; the others are unknown


def train(
    source: Source,
    kind: str = "bpe",
    vocab_size: int = 8192,
    field: str | tuple[str, ...] = "text",
    lowercase: bool = False,
    special_tokens: tuple[str, ...] = (),
    sentinels: int = 0,
    byte_fallback: bool = False,
    max_examples: int | None = None,
) -> Tokenizer:
    """Train a tokenizer on text; the same text gives the same tokenizer.

    bpe is byte-level BPE as GPT-2 has it (Radford et al. 2019, 2.2), with <|endoftext|> for begin, end and padding.
    wordpiece is BERT's (Devlin et al. 2018, 3), with [PAD], [UNK], [CLS], [SEP] and [MASK]: [CLS] text [SEP].
    unigram is T5's and Marian's (Kudo 2018, 3.2), with <pad>, </s> and <unk>: text </s>.

    Args:
      source: the examples; all are read.
      kind: bpe, wordpiece or unigram.
      vocab_size: how many tokens it has, all special ones included; fewer where the text does not give as many.
      field: the text of an example, or its texts.
      lowercase: whether case is dropped; for wordpiece accents too, as in BERT.
      special_tokens: more of them, such as <|im_start|>; they come after those of the kind.
      sentinels: how many tokens <extra_id_0>, ... span corruption gets; they come last, the first one very last.
      byte_fallback: unigram only: characters that the text lacks become bytes, <0x00> to <0xFF>, and not <unk>.
      max_examples: how many examples are read, evenly spaced; None reads all.

    Raises:
      UserError: no such kind or field, no text, or a vocabulary too small for the text's characters.
    """
    if kind not in KINDS:
        raise UserError(f"kind: there is no '{kind}'{nearest(kind, KINDS)}")
    if byte_fallback and kind != "unigram":
        raise UserError("byte_fallback: only unigram takes it; bpe is made of bytes, and wordpiece has [UNK]")
    fields = (field,) if isinstance(field, str) else field
    texts = _Texts(source, fields, max_examples)
    size = vocab_size - sentinels
    about = f"training a {kind} tokenizer on {len(texts):,} examples"
    start = time.monotonic()
    _tell(f"{about} ...")
    if kind == "bpe":
        trained = _train_bpe(texts, size, lowercase, special_tokens)
    elif kind == "wordpiece":
        trained = _train_wordpiece(texts, size, lowercase, special_tokens)
    else:
        trained = _train_unigram(texts, size, lowercase, special_tokens, byte_fallback)
    add_sentinels(trained.backend, sentinels)
    _tell(f"{about}: {trained.vocab_size:,} tokens, {time.monotonic() - start:.1f} s")
    return trained


class _Texts:
    """The texts of a source, as often as they are asked for.

    Attributes:
      characters: how often each one occurred in what was read last.
    """

    def __init__(self, source: Source, fields: tuple[str, ...], max_examples: int | None):
        if len(source) == 0 or not fields:
            raise UserError("source: there is no text to train a tokenizer on")
        if max_examples is not None and max_examples < 1:
            raise UserError(f"max_examples: {max_examples} is less than 1")
        count = min(len(source), max_examples or len(source))
        self._source, self._fields = source, fields
        self._indices = np.linspace(0, len(source) - 1, count).astype(int)
        self.characters: collections.Counter[str] = collections.Counter()
        list(self._of(0))  # a field that is not there is found before the work begins

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[str]:
        self.characters.clear()
        for index in self._indices:
            for text in self._of(int(index)):
                self.characters.update(text)
                yield text

    def _of(self, index: int) -> Iterator[str]:
        example = self._source[index]
        for field in self._fields:
            if not isinstance(example.get(field), str):
                raise UserError(f"field: an example has no text '{field}'{nearest(field, example)}")
            yield example[field]

    def alphabet(self, normalizer: normalizers.Normalizer) -> collections.Counter[str]:
        """Return how often each character occurred once normalised."""
        found: collections.Counter[str] = collections.Counter()
        for character, count in self.characters.items():
            for normal in normalizer.normalize_str(character):
                if not normal.isspace():
                    found[normal] += count
        return found


def _train_bpe(texts: _Texts, vocab_size: int, lowercase: bool, special_tokens: tuple[str, ...]) -> Tokenizer:
    specials = ["<|endoftext|>", *special_tokens]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_size(vocab_size, len(specials) + len(alphabet), "special tokens and bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    roles = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    return Tokenizer(backend, backend.get_vocab()["<|endoftext|>"], specials=roles)


def _train_wordpiece(texts: _Texts, vocab_size: int, lowercase: bool, special_tokens: tuple[str, ...]) -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *special_tokens]
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()

    def fit(size: int, first: Sequence[str], **options: Any) -> dict[str, int]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=2, special_tokens=[*first], show_progress=False, **options
        )
        backend.train_from_iterator(texts, trainer)
        return backend.get_vocab()

    # The trainer numbers the characters inside words as its hash table gives them, which breaks ties between merges;
    # it numbers special tokens as they are listed. So it is told its alphabet, sorted, as if that were special.
    occurring = fit(0, specials).keys() - set(specials)
    counts = texts.alphabet(backend.normalizer)
    kept = sorted(sorted(counts), key=lambda c: counts[c], reverse=True)[:ALPHABET]
    alphabet = [piece for piece in sorted(occurring) if piece.removeprefix("##" * (len(piece) == 3)) in kept]
    _check_size(vocab_size, len(specials) + len(alphabet), "special tokens and characters")
    backend.model = models.WordPiece(unk_token="[UNK]")
    vocabulary = fit(vocab_size, [*specials, *alphabet], initial_alphabet=kept, limit_alphabet=len(kept))

    trained = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trained.decoder = backend.decoder
    trained.add_special_tokens(specials)
    trained.post_processor = bert_frame(trained)
    roles = {role: f"[{role.upper()}]" for role in ("unk", "sep", "cls", "mask")}
    return Tokenizer(trained, vocabulary["[PAD]"], specials=roles | {"bos": "[CLS]", "eos": "[SEP]"})


def _train_unigram(
    texts: _Texts, vocab_size: int, lowercase: bool, special_tokens: tuple[str, ...], byte_fallback: bool
) -> Tokenizer:
    specials = ["<pad>", "</s>", "<unk>", *special_tokens]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    backend = tokenizers.Tokenizer(models.Unigram())
    steps = [normalizers.Nmt(), normalizers.NFKC(), *[normalizers.Lowercase()] * lowercase]
    spaces = [normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*steps, *spaces])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(fallback), special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    error = None
    try:
        backend.train_from_iterator(texts, trainer)
    except UserError:
        raise
    except Exception as raised:  # the trainer has no class of its own for a vocabulary that is too small
        error = raised
    # Where there is room for the characters only, the trainer gives every piece that it has: one more is needed.
    least = len(texts.alphabet(normalizers.Sequence(steps)).keys() | {"▁"}) + 1 + len(specials) + len(fallback)
    _check_size(vocab_size, least, "special tokens and characters")
    if error is not None:
        raise error
    _check_size(vocab_size, backend.get_vocab_size() + len(fallback), "special tokens and characters")
    pieces = _canonical(json.loads(backend.to_str())["model"]["vocab"], len(specials))
    pieces[len(specials) : len(specials)] = [(token, pieces[-1][1] - 10) for token in fallback]
    backend.model = models.Unigram(pieces, unk_id=specials.index("<unk>"), byte_fallback=byte_fallback)
    metaspace = decoders.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if byte_fallback else metaspace
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", specials.index("</s>"))]
    )
    return Tokenizer(backend, specials.index("<pad>"), specials={"eos": "</s>", "unk": "<unk>"})


def _canonical(pieces: Sequence[tuple[str, float]], specials: int) -> list[tuple[str, float]]:
    """Return a unigram vocabulary without what its trainer's hash tables decided.

    The sums behind the scores differ in the tenth digit. Characters that no text needs get the least score plus 0,
    0.0001, 0.0002, ... in any order; here each of them gets the least score.
    """
    least = min(score for _, score in pieces[specials:])

    def score(piece: str, value: float) -> float:
        rank = (value - least) / 1e-4
        rare = len(piece) == 1 and rank < len(pieces) and abs(rank - round(rank)) < 1e-5
        return round(least if rare else value, 3)

    rest = [(piece, score(piece, value)) for piece, value in pieces[specials:]]
    first = [(piece, value) for piece, value in pieces[:specials]]
    return first + sorted(rest, key=lambda entry: (-entry[1], entry[0]))


def _check_size(vocab_size: int, least: int, what: str) -> None:
    if vocab_size < least:
        raise UserError(f"vocab_size: {vocab_size} tokens, without sentinels, are too few; {least} {what} are needed")


def _tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
