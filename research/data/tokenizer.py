"""Text to token ids, by Hugging Face's `tokenizers`."""

import dataclasses
import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from research import assets
from research.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what models need to know of it.

    Attributes:
      backend: the `tokenizers.Tokenizer`, without padding.
      pad_id: the id that fills a batch up.
      folder: where its files came from, for export; None where it was made here.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    folder: pathlib.Path | None = None

    def truncated(self, max_length: int) -> "Tokenizer":
        """Returns one whose encodings hold at most `max_length` tokens; the longer text of a pair is cut first."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.enable_truncation(max_length)
        return dataclasses.replace(self, backend=backend)

    def save(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Returns the files that `transformers` loads the tokenizer from; those it was not loaded from are written."""
        if self.folder is not None and (self.folder / "tokenizer.json").exists():
            return [self.folder / name for name in FILES if (self.folder / name).exists()]
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": self.backend.id_to_token(self.pad_id)}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


def load(path: str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder.

    Args:
      path: anything that `assets.resolve` takes: the folder, or its tokenizer.json. A folder with a vocab.txt alone
        gets BERT's WordPiece tokenizer.
    """
    file = assets.resolve(path)
    folder = file if file.is_dir() else file.parent
    file = file if file.is_file() else folder / "tokenizer.json"
    settings = _json(folder / "tokenizer_config.json")
    if file.exists():
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_padding()
        backend.no_truncation()
    elif (folder / "vocab.txt").exists():
        lowercase = bool(settings.get("do_lower_case", True))
        wordpiece = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase)
        backend = wordpiece._tokenizer
    else:
        raise UserError(f"no tokenizer.json and no vocab.txt in {folder}")
    return Tokenizer(backend, _pad_id(backend, settings, _json(folder / "config.json")), folder)


def byte_level() -> Tokenizer:
    """Returns a tokenizer that needs no files: one token a byte of UTF-8, framed as BERT frames its texts."""
    specials = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(specials)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(backend, vocabulary["[PAD]"])


def _pad_id(backend: tokenizers.Tokenizer, settings: dict, model: dict) -> int:
    token = settings.get("pad_token") or "[PAD]"
    token = token["content"] if isinstance(token, dict) else token
    for candidate in (token, "[PAD]", "<pad>"):
        if (found := backend.token_to_id(candidate)) is not None:
            return found
    return int(model.get("pad_token_id") or 0)


def _json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
