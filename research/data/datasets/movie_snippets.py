"""Sentences of movie reviews with the mean of twenty people's ratings, as a two-class task.

Hutto and Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text"; the snippets are those of Pang and Lee (2004). The file is inside the vaderSentiment
0.5 source package.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from research import assets
from research.errors import UserError

SOURCE = (
    "pypi://vaderSentiment==0.5/vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    "!/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    "#sha256=5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
)

with tfds.core.registered.skip_registration():  # found by its module's name, see data/source.py

    class MovieSnippets(tfds.core.GeneratorBasedBuilder):
        """9,509 training and 1,057 test snippets, labelled by the sign of their rating.

        Dropped: ratings of 0 and, of equal texts, all but the one of the lowest id. Test: every row
        whose position in ascending id is divisible by 10. Features: `text`, `label` (0 negative,
        1 positive), `id`, `rating` in [-4, 4].
        """

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                "id": tfds.features.Scalar(np.int64),
                "rating": tfds.features.Scalar(np.float32),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("text", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # assets fetch, check and cache
            rows = list(read(assets.resolve(SOURCE)))
            return {
                "train": self._generate_examples(rows, test=False),
                "test": self._generate_examples(rows, test=True),
            }

        def _generate_examples(self, rows: list[dict[str, Any]], test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
            for position, row in enumerate(rows):
                if (position % 10 == 0) == test:
                    yield position, row


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the rated snippets of a file of `id TAB rating TAB text` lines, in ascending id.

    Raises:
      UserError: a line has other fields; it is named.
    """
    rows: list[tuple[int, float, str]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                first, second, text = line.rstrip("\r\n").split("\t")
                rows.append((int(first), float(second), text))
            except ValueError:
                raise UserError(f"{path}:{number}: not 'id TAB rating TAB text'") from None
    seen = set()
    for identity, rating, text in sorted(rows):
        if rating and text not in seen:
            seen.add(text)
            label = int(rating > 0)
            yield {"text": text, "label": label, "id": identity, "rating": rating}
