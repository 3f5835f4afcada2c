"""Named-entity scores of CoNLL-2003: an entity is correct if its type and its span both match."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.evaluators import batches
from research.evaluators.numbered import numbered
from research.metrics import Mean, merge
from research.task import Batch, Params
from research.tasks.token_classification import TokenClassification, spans


@dataclasses.dataclass(frozen=True)
class Entities:
    """Labels every word of a dataset and scores the resulting entities.

    Words beyond the `max_length` of the data's op are labelled O, so that every word is scored.

    Attributes:
      task: its `label_names` are those of the data.
      mesh: the device mesh.
      data: the evaluation data; one of its ops is `AlignLabels`.
      labels: the field of the words' true labels, class ids.
    """

    task: TokenClassification
    mesh: Mesh
    data: Dataset
    labels: str = "ner"

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return "loss" and "accuracy" of words, and "precision", "recall", "f1" and "f1_KIND" of entities."""
        data, means = self.dataset, []
        right, predicted = [], []
        for mean, batch in batches.run(self._batch, params, data, self.mesh, check):
            means.append(mean)
            for i in np.flatnonzero(batch["mask"]):
                example = data.source[int(batch["example"][i])]
                (row,) = data.transform(example)
                right.append([self.task.label_names[int(label)] for label in example[self.labels]])
                predicted.append(self.task.word_labels(row, {"label": batch["label"][i]}))
        return {"loss": float(merge(means)["loss"].compute())} | score(right, predicted)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data as it is read, each example with its number."""
        return numbered(self.data)

    def _batch(self, params: Params, batch: Batch) -> tuple[dict[str, Mean], dict[str, jax.Array]]:
        label = self.task.predict(params, batch, jax.random.key(0))["label"]
        return self.task.metrics(params, batch), {"label": label, "example": batch["example"], "mask": batch["mask"]}


def score(right: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score the labels of sentences.

    Args:
      right: true label names such as "B-PER", one list per sentence.
      predicted: label names of the same lengths.

    Returns:
      "accuracy" of labels; "precision", "recall" and "f1" over all entities, and "f1_KIND" of each type that occurs;
      0 where the denominator is 0.
    """
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in ("right", "predicted", "common")}
    for labels, others in zip(right, predicted, strict=True):
        true, found = set(spans(labels)), set(spans(others))
        for name, kept in (("right", true), ("predicted", found), ("common", true & found)):
            counts[name].update(kind for kind, *_ in kept)
    agreed = [a == b for labels, others in zip(right, predicted) for a, b in zip(labels, others, strict=True)]
    common, found_all, true_all = (counts[name].total() for name in ("common", "predicted", "right"))
    result = {
        "accuracy": float(np.mean(agreed)) if agreed else 0.0,
        "precision": common / max(found_all, 1),
        "recall": common / max(true_all, 1),
        "f1": _f1(common, found_all, true_all),
    }
    kinds = sorted(counts["right"] | counts["predicted"])
    return result | {f"f1_{k}": _f1(counts["common"][k], counts["predicted"][k], counts["right"][k]) for k in kinds}


def _f1(common: int, predicted: int, right: int) -> float:
    return 2 * common / (predicted + right) if common else 0.0
