"""GGUF, llama.cpp's format: one file with metadata, quantised weights and a tokenizer; here the file and its tokenizer.

`pretrained.gguf` reads the weights.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import gguf
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from research.errors import UserError, nearest

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens


# How text is cut before byte pairs are merged, by the name that a file gives it.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


class Vocabulary(NamedTuple):
    """The tokenizer in a file.

    Attributes:
      backend: what makes ids of a text.
      pad_id: the id that fills a batch up.
      specials: role (bos, eos, unk) -> token, for those that the file names.
      chat_template: Jinja, as Transformers has them; None where there is none.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    specials: dict[str, str]
    chat_template: str | None


def is_file(path: pathlib.Path) -> bool:
    """Say whether `path` is a file of this format, by its name."""
    return path.suffix == ".gguf" and path.is_file()


def tokenizer(path: pathlib.Path) -> Vocabulary:
    """Return the tokenizer in a file.

    Raises:
      UserError: it is not of byte pairs, or cuts texts in a way that is not implemented.
    """
    fields = read(path).fields
    held = {
        name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.")
    }
    if held.get("model") != "gpt2":
        raise UserError(
            f"{path} has a tokenizer of the kind '{held.get('model')}', of which only 'gpt2' is implemented"
        )
    cut = held.get("pre", "")
    if cut not in _PRE_TOKENIZERS:
        raise UserError(f"{path} has the unknown pre-tokenizer '{cut}'{nearest(cut, _PRE_TOKENIZERS)}")
    tokens = held["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in held["merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _PRE_TOKENIZERS[cut]()
    backend.decoder = decoders.ByteLevel()
    types = held.get("token_type", [])
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        named = [token for token, its in zip(tokens, types) if its == kind]
        backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in named])
    ids = {role: held.get(f"{name}_token_id") for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))}
    specials = {role: tokens[id] for role, id in ids.items() if id is not None}
    ends = {role: specials[role] for role in ("bos", "eos") if held.get(f"add_{role}_token") and role in specials}
    if ends:
        template = [ends.get("bos"), "$A", ends.get("eos")]
        backend.post_processor = processors.TemplateProcessing(
            single=[part for part in template if part],
            special_tokens=[(token, tokens.index(token)) for token in ends.values()],
        )
    pad_id = held.get("padding_token_id", ids["eos"])
    return Vocabulary(backend, 0 if pad_id is None else int(pad_id), specials, held.get("chat_template"))


@functools.lru_cache(maxsize=1)
def _opened(path: pathlib.Path, changed: int) -> gguf.GGUFReader:
    # Finding its way through a vocabulary takes the reader seconds, so that the last file stays open.
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def read(path: pathlib.Path) -> gguf.GGUFReader:
    """Return the reader of a file, kept open; raise UserError where it is damaged."""
    return _opened(path, path.stat().st_mtime_ns)
