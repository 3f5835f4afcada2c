"""LibreOffice's help in English, German and French: paragraphs that translate each other.

From the Debian packages libreoffice-help-* 7.4.7 (MPL 2.0), whose pages have the same names and the same ids of
paragraphs in every language.
"""

import hashlib
import html.parser
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from research import assets
from research.errors import UserError

_PACKAGE = "apt://libreoffice-help-{}=4:7.4.7-1+deb12u14/usr/share/libreoffice/help/{}/text#sha256={}"
SOURCES = {
    "en": _PACKAGE.format("en-us", "en-US", "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712"),
    "de": _PACKAGE.format("de", "de", "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f"),
    "fr": _PACKAGE.format("fr", "fr", "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206"),
}
WORDS = range(4, 61)  # in either language

# The wording for one platform or application, which the page's script shows in place of the text beside it.
_ELSEWHERE = "MAC"
_VARIANTS = ("WIN", "UNIX", "WRITER", "CALC", "IMPRESS", "DRAW", "MATH", "CHART", "BASE")

Pair = tuple[str, str, str]  # source, target, file

with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class Libreoffice(tfds.core.GeneratorBasedBuilder):
        """Pairs of paragraphs of 4 to 60 words: `source` (English), `target`, `file` (their page).

        Configs: en-de, with 20,775 train, 1,315 validation and 1,019 test pairs; en-fr, with 19,845, 1,166
        and 1,031.

        Left out are paragraphs that are not translated, whose wording depends on the application, and whose English
        is that of an earlier one. Pages are split by a hash of their name, a twentieth each to validation and test.
        A pair is left out of a split if either of its sides, but for case, numbers and punctuation, is also in a
        split that judges it: in validation or test for train, in test for validation.
        """

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
            tfds.core.BuilderConfig(name="en-de", description="English to German."),
            tfds.core.BuilderConfig(name="en-fr", description="English to French."),
        ]

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict({n: tfds.features.Text() for n in ("source", "target", "file")}),
                supervised_keys=("source", "target"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # assets fetch, check and cache
            first, second = self.builder_config.name.split("-")
            every = list(pairs(assets.resolve(SOURCES[first]), assets.resolve(SOURCES[second])))
            return {split: self._generate_examples(part) for split, part in without_leaks(every).items()}

        def _generate_examples(self, part: Sequence[Pair]) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, (source, target, file) in enumerate(part):
                yield position, {"source": source, "target": target, "file": file}


def pairs(source: pathlib.Path, target: pathlib.Path) -> Iterator[Pair]:
    """Yield the paragraphs of the pages that two folders share, in the order of the pages' names.

    Raises:
      UserError: the folders share no page.
    """
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.html"))
    shared = [name for name in names if (target / name).exists()]
    if not shared:
        raise UserError(f"'{source}' and '{target}' share no page")
    seen = set()
    for name in shared:
        translations = paragraphs((target / name).read_text(encoding="utf-8"))
        for identity, text in paragraphs((source / name).read_text(encoding="utf-8")).items():
            translation = translations.get(identity, "")
            fits = len(text.split()) in WORDS and len(translation.split()) in WORDS
            if fits and text != translation and text not in seen:
                seen.add(text)
                yield text, translation, name


def paragraphs(page: str) -> dict[str, str]:
    """Return id -> text of the paragraphs of a page."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    return parser.found


def without_leaks(every: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Split pairs by file; leaves those out of a split that are nearly the same as one that judges it."""
    splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for pair in every:
        share = int(hashlib.sha256(pair[2].encode()).hexdigest(), 16) % 20
        splits[{0: "validation", 1: "test"}.get(share, "train")].append(pair)
    judging: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = [pair for pair in splits[split] if not judging & set(map(_normalise, pair[:2]))]
        judging |= {_normalise(side) for pair in splits[split] for side in pair[:2]}
    return splits


def _normalise(text: str) -> str:
    """Return the words in lower case, with every number the same."""
    return " ".join(re.sub(r"\d+", "0", re.sub(r"[\W_]+", " ", text.lower())).split())


class _Paragraphs(html.parser.HTMLParser):
    """Collect the text of every `<p id=...>`, the first of those of one id."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._id: str | None = None  # of the paragraph being read
        self._parts: list[str] = []
        self._hidden = 0  # spans open, from the hidden one on

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "p":
            self._id, self._parts, self._hidden = values.get("id"), [], 0
        elif tag == "br":
            self._parts.append(" ")
        elif tag == "span":
            if values.get("class") in _VARIANTS:
                self._id = None
            if self._hidden or values.get("class") == _ELSEWHERE:
                self._hidden += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._hidden:
            self._hidden -= 1
        elif tag == "p" and self._id:
            self.found.setdefault(self._id, " ".join("".join(self._parts).split()))
            self._id = None

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._parts.append(data)
