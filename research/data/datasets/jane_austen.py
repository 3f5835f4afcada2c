"""Jane Austen's six novels, to model English with, or to tell the novels apart by their paragraphs.

The texts are Project Gutenberg's, in the public domain, from the janeaustenr 1.0.0 package of Debian: an R "lazy-load"
file, one compressed vector of lines a novel.
"""

import itertools
import pathlib
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from research import assets
from research.errors import UserError

SOURCE = (
    "apt://r-cran-janeaustenr=1.0.0-1/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    "#sha256=df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
)
NOVELS = ("Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice", "Sense and Sensibility")
LEAST_WORDS = 20  # of a paragraph that is an example of its novel
EVERY = 20  # chapters: the tenth of them validates, the last one tests

_CHAPTER = re.compile(r"chapter ([ivxl]+|\d+)", re.IGNORECASE)
_VOLUME = re.compile(r"volume [ivx]+", re.IGNORECASE)
_CHARACTERS, _STRINGS = 9, 16  # R's types of values; NA is a string of length -1, which no novel has

with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class JaneAusten(tfds.core.GeneratorBasedBuilder):
        """Chapters, or their paragraphs: of every 20 chapters of a novel the tenth validates and the twentieth tests.

        Configs:
          chapters (the default): 244 train, 14 validation, 11 test; 3,665,426, 213,066 and 145,713 bytes. Features:
            `text`, the lines as the source has them, heading included; `novel`, one of six; `chapter`, counted from
            1 through all volumes of the novel. What stands before a novel's first chapter goes with that one.
          paragraphs: 7,014 train, 390 validation, 286 test: those of at least 20 words, on one line each. Features:
            `text`, `label` (the novel), `chapter`.
        """

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
            tfds.core.BuilderConfig(name="chapters", description="One example a chapter."),
            tfds.core.BuilderConfig(name="paragraphs", description="One example a paragraph, labelled by its novel."),
        ]

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "text": tfds.features.Text(),
                self._label: tfds.features.ClassLabel(names=NOVELS),
                "chapter": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        @property
        def _label(self) -> str:
            return "label" if self.builder_config.name == "paragraphs" else "novel"

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # assets fetch, check and cache
            novels = read(assets.resolve(SOURCE))
            return {split: self._generate_examples(novels, split) for split in ("train", "validation", "test")}

        def _generate_examples(self, novels: dict[str, list[str]], wanted: str) -> Iterator[tuple[int, dict[str, Any]]]:
            position = 0
            for novel, lines in novels.items():
                for number, chapter in enumerate(chapters(lines), start=1):
                    split = {EVERY // 2: "validation", 0: "test"}.get(number % EVERY, "train")
                    whole = self.builder_config.name == "chapters"
                    for text in [chapter] if whole else paragraphs(chapter):
                        if split == wanted:
                            yield position, {"text": text, self._label: novel, "chapter": number}
                            position += 1


def read(path: pathlib.Path) -> dict[str, list[str]]:
    """Return novel -> its lines, from the records of an R lazy-load file, each of which begins with its title.

    Raises:
      UserError: a record is no vector of lines, or the novels are others.
    """
    novels = {lines[0].casefold(): lines for lines in _records(path)}
    if sorted(novels) != sorted(novel.casefold() for novel in NOVELS):
        raise UserError(f"'{path}' holds other novels: {', '.join(novels)}")
    return {novel: novels[novel.casefold()] for novel in NOVELS}


def chapters(lines: Sequence[str]) -> list[str]:
    """Split a novel before every heading of a chapter; a volume's heading goes with its first chapter."""
    starts = [i for i, line in enumerate(lines) if _CHAPTER.fullmatch(line.strip())]
    for index, start in enumerate(starts):
        above = next((i for i in range(start - 1, -1, -1) if lines[i].strip()), 0)
        if _VOLUME.fullmatch(lines[above].strip()):
            starts[index] = above
    bounds = [0, *starts[1:], len(lines)]
    return ["\n".join(lines[start:end]).strip("\n") + "\n" for start, end in itertools.pairwise(bounds)]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of at least `LEAST_WORDS` words, on one line each."""
    every = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [paragraph for paragraph in every if len(paragraph.split()) >= LEAST_WORDS]


def _records(path: pathlib.Path) -> Iterator[list[str]]:
    """Yield the values of a lazy-load file: after four bytes of its size, each is a zlib stream."""
    rest = path.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        try:
            value = stream.decompress(rest[4:])
            yield _strings(value)
        except (zlib.error, struct.error, ValueError) as error:
            raise UserError(f"'{path}' is not a file of lines of R: {error}") from error
        rest = stream.unused_data


def _strings(value: bytes) -> list[str]:
    """Read a character vector in R's serialisation: big-endian, version 3, which names its encoding."""
    magic, version, _, _, size = struct.unpack_from(">2sIIII", value)
    if (magic, version) != (b"X\n", 3):
        raise ValueError("another format than version 3 of R's XDR")
    offset = 18 + size
    kind, count = struct.unpack_from(">II", value, offset)
    if kind != _STRINGS:
        raise ValueError(f"a value of type {kind}, not a vector of strings")
    offset += 8
    lines = []
    for _ in range(count):
        flags, length = struct.unpack_from(">II", value, offset)
        if flags & 0xFF != _CHARACTERS:
            raise ValueError(f"a string of type {flags & 0xFF}")
        offset += 8 + length
        lines.append(value[offset - length : offset].decode("utf-8"))
    return lines
