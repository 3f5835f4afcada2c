"""Images with texts: the user's own pairs, captions made of classes, and tokens of one length for all texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research import assets, storage
from research.data import files
from research.data.source import Source
from research.data.text import text_of
from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest

FEATURES = ("input_ids", "attention_mask")


def captions(
    train: files.Paths,
    images: str,
    image: str = "image",
    text: str = "text",
    validation: files.Paths | None = None,
    test: files.Paths | None = None,
    split: str = "train",
    held_out: float = 0.0,
) -> Source:
    """Return the user's own images with texts: {"image": path, "text": str}; `data.image.Decode` reads the images.

    Args:
      train: tables, as `data.files.pairs` takes them; so are `validation` and `test`.
      images: the folder in which the images are found, anything that `assets.resolve` takes.
      image: the column of an image's path below that folder.
      text: the column of its text. An image with several texts has several rows.
      validation: see `train`.
      test: see `train`.
      split: "train", "validation" or "test".
      held_out: the share of the training rows that becomes "validation"; the texts of an image stay together.

    Raises:
      UserError: no such file, folder, column or split; bad rows.
    """
    pairs = files.pairs(train, image, text, validation, test, split, held_out)
    return Source(_Captioned(pairs, str(assets.resolve(images))))


@dataclasses.dataclass(frozen=True)
class _Captioned(Sequence[Mapping[str, Any]]):
    """Pairs of a path below a folder and a text, as images with texts."""

    pairs: Source
    folder: str

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        pair = self.pairs[index]
        return {"image": str(storage.path(self.folder) / pair["source"]), "text": pair["target"]}


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the texts of every class in turn, one for each template: "a photo of a {}" and its like.

    Raises:
      UserError: there are no classes or no templates, or one has no place for the class.
    """
    if not classes:
        raise UserError("classes: there are none; name them")
    if not templates:
        raise UserError("templates: there are none; 'a photo of a {}' is one")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"templates: '{template}' must have one {{}}, where the class stands")
    return [template.replace("{}", name) for name in classes for template in templates]


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> dict[str, np.ndarray]:
    """Return the `FEATURES` of texts, int32 [N, max_length], with special tokens, cut off or padded."""
    return _padded(tokenizer.truncated(max_length), texts, max_length)


def _padded(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> dict[str, np.ndarray]:
    """Return the same by a tokenizer that cuts off, of which a copy takes long to make."""
    found = tokenizer.backend.encode_batch(list(texts))
    ids = np.full((len(texts), max_length), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(texts), max_length), np.int32)
    for row, encoding in enumerate(found):
        ids[row, : len(encoding.ids)], mask[row, : len(encoding.ids)] = encoding.ids, 1
    return dict(zip(FEATURES, (ids, mask)))


class ClassCaptions:
    """Adds `FEATURES` of a text made of the example's class and of a template, drawn anew whenever it is read."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        classes: Sequence[str],
        templates: Sequence[str],
        max_length: int = 77,
        label: str = "label",
    ):
        """Take the class of number `label` in `classes`, and every text up to `max_length` tokens."""
        self._texts = encode(tokenizer, prompts(classes, templates), max_length)
        self._classes, self._templates, self._label = len(classes), len(templates), label

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with the two features, int32 [max_length]."""
        if self._label not in example:
            raise UserError(f"label: an example has no class '{self._label}'{nearest(self._label, example)}")
        number = int(example[self._label])
        if not 0 <= number < self._classes:
            raise UserError(f"classes: there are {self._classes}, and an example is of number {number}")
        row = number * self._templates + int(rng.integers(self._templates))
        return example | {name: array[row] for name, array in self._texts.items()}


class PaddedTokens:
    """Adds `FEATURES` of the example's text, all of one length, as SigLIP's texts must be."""

    def __init__(self, tokenizer: Tokenizer, field: str = "text", max_length: int = 77):
        """Read the text in `field`, up to `max_length` tokens."""
        self._tokenizer, self._field, self._length = tokenizer.truncated(max_length), field, max_length

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the example with the two features, int32 [max_length]."""
        arrays = _padded(self._tokenizer, [text_of(example, self._field)], self._length)
        return example | {name: array[0] for name, array in arrays.items()}
