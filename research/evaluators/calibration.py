"""Calibration: whether a classifier is right as often as it says, with a reliability diagram."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from matplotlib.figure import Figure

from research.errors import UserError
from research.evaluators.classification import Scores
from research.metrics import Mean
from research.reporting import pictures
from research.reporting.figures import COLOURS
from research.task import Batch, Params


@dataclasses.dataclass(frozen=True)
class Calibration(Scores):
    """`Scores` of a classifier, with its expected calibration error and a reliability diagram (Guo 2017, section 2).

    Attributes:
      bins: intervals of equal width into which confidences are sorted.
    """

    bins: int = 15

    def __post_init__(self):
        super().__post_init__()
        if self.bins < 1:
            raise UserError(f"bins: {self.bins} must be 1 or more")
        if (objective := getattr(self.task, "objective", "softmax")) != "softmax":
            raise UserError(f"task: calibration is that of one predicted class, which '{objective}' does not have")

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> Mapping[str, float | np.ndarray]:
        """Return the scores, "calibration_error" (a share), "confidence" and the picture "reliability"."""
        loss, columns = self._outputs(self.data, params, check)
        right = columns["target"] == columns["prediction"]
        error, table = calibration_error(columns["confidence"], right, self.bins)
        numbers = {"calibration_error": error, "confidence": float(columns["confidence"].mean())}
        return self._scored(loss, columns) | numbers | {"reliability": draw(table, error)}

    def _batch(self, params: Params, batch: Batch) -> tuple[dict[str, Mean], dict[str, jax.Array]]:
        means, rows = super()._batch(params, batch)
        probabilities_BxC = self.task.predict(params, batch, jax.random.key(0))["probabilities"]
        return means, {**rows, "confidence": probabilities_BxC.max(axis=-1)}


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int) -> tuple[float, np.ndarray]:
    """Return the expected calibration error, and a table of the bins.

    It is the mean over examples of the distance between the accuracy of their bin and its mean confidence (Guo 2017,
    equation 3).

    Args:
      confidence: probabilities of the predicted classes, [N].
      right: whether the predictions are right, [N].
      bins: intervals ((i - 1) / bins, i / bins].

    Returns:
      The error, and float [bins, 3]: the share of examples, their mean confidence and their accuracy; 0 where there are
      none.
    """
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(number, minlength=bins)
    sums = [np.bincount(number, weights=values, minlength=bins) for values in (confidence, right)]
    mean, accuracy = (total / np.maximum(count, 1) for total in sums)
    table = np.stack([count / len(confidence), mean, accuracy], axis=1)
    return float((table[:, 0] * np.abs(mean - accuracy)).sum()), table


def draw(table: np.ndarray, error: float) -> np.ndarray:
    """Draw accuracy over confidence, and how many examples each bin has."""
    bins = len(table)
    left = np.arange(bins) / bins
    figure = Figure(figsize=(4, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(left, table[:, 2], 1 / bins, align="edge", color=COLOURS[0], edgecolor="white", label="accuracy")
    filled = table[:, 0] > 0
    upper.plot(table[filled, 1], table[filled, 2], "o", color=COLOURS[1], markersize=4, label="at the mean confidence")
    upper.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="calibrated")
    upper.set(ylim=(0, 1), ylabel="accuracy", title=f"expected calibration error {100 * error:.2f} %")
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(left, table[:, 0], 1 / bins, align="edge", color=COLOURS[0], edgecolor="white")
    lower.set(xlim=(0, 1), xlabel="confidence", ylabel="examples, share")
    return pictures.render(figure)
