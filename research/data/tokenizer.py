"""Text to token ids and back, by Hugging Face's `tokenizers`: loaded, trained on the user's text, or bytes."""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from research import assets
from research.data import gguf
from research.errors import UserError

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
GENERATION = "generation_config.json"
# What special tokens are called where a folder does not say; bos and eos as decoders need them, also of encoders'.
WELL_KNOWN = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "unk": ("[UNK]", "<unk>"),
    "sep": ("[SEP]",),
    "cls": ("[CLS]",),
    "mask": ("[MASK]", "<mask>"),
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and what models need to know of it.

    Attributes:
      backend: the `tokenizers.Tokenizer`, without padding.
      pad_id: the id that fills a batch up.
      folder: the folder whose tokenizer.json it was loaded from, for export; None where it was made here.
      specials: role (bos, eos, unk, sep, cls, mask) -> token, for the roles that it has.
      chat_template: Jinja, as Transformers has them; None where the tokenizer came without.
      more_ends: ids besides eos at which the folder's model ends an output, such as the end of a turn.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    folder: pathlib.Path | None = None
    specials: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    more_ends: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text."""
        return self._id("bos")

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text."""
        return self._id("eos")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids at which a generated text ends, eos first."""
        return (() if self.eos_id is None else (self.eos_id,)) + self.more_ends

    @property
    def unk_id(self) -> int | None:
        """The id of what the vocabulary lacks."""
        return self._id("unk")

    @property
    def sep_id(self) -> int | None:
        """The id that ends each text of a pair, for encoders."""
        return self._id("sep")

    @property
    def cls_id(self) -> int | None:
        """The id that begins an encoder's input."""
        return self._id("cls")

    @property
    def mask_id(self) -> int | None:
        """The id that hides a token."""
        return self._id("mask")

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all tokens that are no text."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special) | {self.pad_id}

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens, as they are written."""
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @functools.cached_property
    def literal_backend(self) -> tokenizers.Tokenizer:
        """One that encodes the text of special tokens like any other text."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def sentinels(self) -> tuple[int, ...]:
        """The ids of <extra_id_0>, <extra_id_1>, ..., which stand for what span corruption takes out."""
        found: list[int] = []
        while (id := self.backend.token_to_id(f"<extra_id_{len(found)}>")) is not None:
            found.append(id)
        return tuple(found)

    def _id(self, role: str) -> int | None:
        return self.backend.token_to_id(self.specials[role]) if role in self.specials else None

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Return the text of ids; those beyond the vocabulary are left out."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return a conversation as the text that a model reads.

        Args:
          messages: in order, each with a "role" (system, user, assistant) and its "content".
          add_generation_prompt: whether to end where the assistant's answer begins.

        Raises:
          UserError: the template does not take these messages.
        """
        specials = {**self.specials, "pad": self.backend.id_to_token(self.pad_id)}
        tokens = {f"{role}_token": token for role, token in specials.items()}
        try:
            return _compiled(self.chat_template or CHATML).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(f"the chat template: {' '.join(str(error).split())}") from error

    def truncated(self, max_length: int) -> "Tokenizer":
        """Return one whose encodings hold at most `max_length` tokens; the longer text of a pair is cut first."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.enable_truncation(max_length)
        return dataclasses.replace(self, backend=backend)

    def save(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Write the files that `transformers`, and `load`, read the tokenizer from, and return them.

        They are copies where it was loaded from such files, but that the padding token is always named.
        """
        folder.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {}
        if self.folder is not None:
            for name in FILES:
                if (self.folder / name).exists():
                    shutil.copyfile(self.folder / name, folder / name)
            settings = _json(folder / "tokenizer_config.json")
            named = _named(settings, _json(folder / "special_tokens_map.json"))
        else:
            self.backend.save(str(folder / "tokenizer.json"))
            named = {f"{role}_token": token for role, token in self.specials.items()}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
            if self.chat_template is not None:
                settings["chat_template"] = self.chat_template
        if "pad_token" not in named:
            settings["pad_token"] = self.backend.id_to_token(self.pad_id)
        _write_json(folder / "tokenizer_config.json", settings)
        if self.more_ends:
            ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.end_ids), "pad_token_id": self.pad_id}
            _write_json(folder / GENERATION, {name: id for name, id in ids.items() if id is not None})
        return [folder / name for name in (*FILES, GENERATION) if (folder / name).exists()]


def load(path: str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder.

    Args:
      path: anything that `assets.resolve` takes: the folder, or its tokenizer.json. A folder with a vocab.txt alone
        gets BERT's WordPiece tokenizer, one with vocab.json and merges.txt GPT-2's, or RoBERTa's if it has a <mask>.
    """
    return read(assets.resolve(path))


def read(file: pathlib.Path) -> Tokenizer:
    """Load the tokenizer of a local folder, or of a GGUF file; see `load`."""
    if gguf.is_file(file):
        return Tokenizer(**gguf.tokenizer(file)._asdict())
    folder = file if file.is_dir() else file.parent
    file = file if file.is_file() else folder / "tokenizer.json"
    settings = _json(folder / "tokenizer_config.json")
    named = _named(settings, _json(folder / "special_tokens_map.json"))
    if file.exists():
        backend = _from_json(file)
    elif (folder / "vocab.txt").exists():
        lowercase = bool(settings.get("do_lower_case", True))
        backend = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase)._tokenizer
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        backend = _from_merges(folder, settings, named)
    else:
        raise UserError(f"no tokenizer.json, no vocab.txt, and no vocab.json with merges.txt in {folder}")
    specials = _specials(backend, named)
    pad_id = _pad_id(backend, named, specials, _json(folder / "config.json"))
    whole = folder if file == folder / "tokenizer.json" and file.exists() else None
    loaded = Tokenizer(backend, pad_id, whole, specials, _chat_template(folder, settings))
    return dataclasses.replace(loaded, more_ends=_more_ends(folder, loaded.eos_id))


def byte_level(sentinels: int = 0) -> Tokenizer:
    """Return a tokenizer that needs no files: one token a byte of UTF-8, framed as BERT frames its texts.

    Args:
      sentinels: how many tokens <extra_id_0>, ... span corruption gets, after the 260 others.
    """
    specials = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(specials)
    # Words make no difference to the ids; whole-word masking asks for them.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = bert_frame(backend)
    add_sentinels(backend, sentinels)
    roles = {"bos": "[CLS]", "eos": "[SEP]", "sep": "[SEP]", "cls": "[CLS]", "mask": "[MASK]"}
    return Tokenizer(backend, vocabulary["[PAD]"], specials=roles)


def add_sentinels(backend: tokenizers.Tokenizer, count: int) -> None:
    """Add <extra_id_0>, ..., the first one last, as in T5's vocabulary."""
    backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(count))])


def bert_frame(backend: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    """Return what frames texts as BERT does: [CLS] A [SEP], or [CLS] A [SEP] B [SEP]."""
    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )


def _from_json(file: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no class of its own
        raise UserError(f"{file} is no tokenizer: {' '.join(str(error).split())[:200]}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def _from_merges(folder: pathlib.Path, settings: Mapping[str, Any], named: Mapping[str, str]) -> tokenizers.Tokenizer:
    """Return GPT-2's tokenizer, or RoBERTa's, which frames its texts."""
    prefix_space = bool(settings.get("add_prefix_space", False))
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    specials = _specials(backend, named)
    known = {*specials.values(), named.get("pad_token", "<pad>")} & backend.get_vocab().keys()
    backend.add_special_tokens([tokenizers.AddedToken(t, lstrip=t == "<mask>", special=True) for t in sorted(known)])
    if "cls" in specials and "sep" in specials:
        sep, cls = ((specials[role], backend.get_vocab()[specials[role]]) for role in ("sep", "cls"))
        backend.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=prefix_space)
    return backend


def _named(*files: Mapping[str, Any]) -> dict[str, str]:
    """Return what tokenizer_config.json and special_tokens_map.json call the special tokens; the first one decides."""
    found: dict[str, str] = {}
    for file in files:
        for name in (*(f"{role}_token" for role in WELL_KNOWN), "pad_token"):
            if token := file.get(name):
                found.setdefault(name, token["content"] if isinstance(token, dict) else token)
    return found


def _specials(backend: tokenizers.Tokenizer, named: Mapping[str, str]) -> dict[str, str]:
    """Return role -> token; a folder that names one of bos and eos means to have no other one."""
    vocabulary = backend.get_vocab()
    guesses = dict(WELL_KNOWN)
    if "<mask>" in vocabulary:  # RoBERTa's frame
        guesses |= {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>")}
    if named.keys() & {"bos_token", "eos_token"}:
        guesses |= {"bos": (), "eos": ()}
    candidates = {role: (named[f"{role}_token"],) if f"{role}_token" in named else guesses[role] for role in guesses}
    first = {role: next((t for t in tokens if t in vocabulary), None) for role, tokens in candidates.items()}
    return {role: token for role, token in first.items() if token is not None}


def _pad_id(
    backend: tokenizers.Tokenizer, named: Mapping[str, str], specials: Mapping[str, str], model: Mapping[str, Any]
) -> int:
    vocabulary = backend.get_vocab()
    for candidate in (named.get("pad_token", ""), "[PAD]", "<pad>"):
        if candidate in vocabulary:
            return vocabulary[candidate]
    if model.get("pad_token_id") is not None:
        return int(model["pad_token_id"])
    return vocabulary[specials["eos"]] if "eos" in specials else 0


def _more_ends(folder: pathlib.Path, eos_id: int | None) -> tuple[int, ...]:
    """Return the ids besides eos at which generation_config.json, or else config.json, has outputs end."""
    found = [_json(folder / file).get("eos_token_id") for file in (GENERATION, "config.json")]
    ends: Any = next((end for end in found if end is not None), [])
    return tuple(id for id in (ends if isinstance(ends, list) else [ends]) if id != eos_id)


def _chat_template(folder: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class _Generation(jinja2.ext.Extension):
    """Transformers' {% generation %}, which marks what the assistant said; here it is what it holds."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    """Compile a chat template for the environment that Transformers gives them; it cannot reach anything else."""
    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
