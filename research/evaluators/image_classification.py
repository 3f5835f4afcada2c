"""Image classification metrics with a confusion matrix and the most confident errors."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
import sklearn.metrics

from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators.classification import Scores
from research.evaluators.numbered import numbered
from research.metrics import Mean
from research.reporting import pictures
from research.task import Batch, Params


@dataclasses.dataclass(frozen=True)
class ImageScores(Scores):
    """`Scores` with pictures of the confusion matrix and of the most confident errors.

    Attributes:
      mistakes: the number of errors shown; 0 draws no pictures.
    """

    mistakes: int = 24

    def __post_init__(self):
        super().__post_init__()
        if self.mistakes < 0:
            raise UserError(f"mistakes: {self.mistakes} must be 0 (no pictures) or more")
        objective = getattr(self.task, "objective", "softmax")
        if self.mistakes and objective != "softmax":
            raise UserError(f"mistakes: must be 0 for '{objective}', which does not predict one class")

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> Mapping[str, float | np.ndarray]:
        """Return {score: value} and the pictures "confusion" and, if there are errors, "mistakes"."""
        if not self.mistakes:
            return super().__call__(params, check)
        loss, columns = self._outputs(self.dataset, params, check)
        labels, predictions = columns["target"], columns["prediction"]
        counts = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(len(self._names)))
        accuracy = np.mean(labels == predictions)
        title = f"{len(labels):,} examples, {100 * accuracy:.2f} % correct"
        drawn = {"confusion": pictures.confusion(counts, self._names, title)}
        wrong = np.flatnonzero(labels != predictions)
        confident = wrong[np.argsort(-columns["probability"][wrong], kind="stable")][: self.mistakes]
        if len(confident):
            drawn["mistakes"] = self._draw({name: column[confident] for name, column in columns.items()}, len(wrong))
        return self._scored(loss, columns) | drawn

    def _batch(self, params: Params, batch: Batch) -> tuple[dict[str, Mean], dict[str, jax.Array]]:
        means, rows = super()._batch(params, batch)
        if "example" not in batch:
            return means, rows
        probabilities_BxC = self.task.predict(params, batch, jax.random.key(0))["probabilities"]
        return means, {**rows, "example": batch["example"], "probability": probabilities_BxC.max(axis=-1)}

    def _draw(self, columns: dict[str, np.ndarray], wrong: int) -> np.ndarray:
        """Draw examples as the model sees them, titled with their true and predicted classes."""
        shown, titles = [], []
        for number, target, prediction, probability in zip(*(columns[name] for name in _COLUMNS)):
            (row,) = self.data.transform(self.data.source[int(number)])
            shown.append(pictures.pixels(row["image"], self.data.ops))
            name, other = self._names[target], self._names[prediction]
            titles.append(f"{name}\npredicted {other}, {100 * probability:.0f} %")
        title = f"The {len(shown)} most confident of {wrong:,} errors"
        return pictures.grid(shown, titles, columns=min(len(shown), 8), title=title)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data as it is read, each example with its number."""
        return numbered(self.data)

    @property
    def _names(self) -> tuple[str, ...]:
        names = getattr(self.task, "label_names", ())
        return tuple(names) or tuple(str(i) for i in range(getattr(self.task.model, "num_outputs", 0)))


_COLUMNS = ("example", "target", "prediction", "probability")
