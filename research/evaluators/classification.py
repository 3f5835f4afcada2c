"""Classification and regression metrics, computed by scikit-learn and scipy over all predictions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import scipy.stats
import sklearn.metrics
from jax.sharding import Mesh

from research.data.dataset import Dataset
from research.errors import UserError, nearest
from research.evaluators import batches
from research.metrics import Mean, merge
from research.task import Batch, Params, Task


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(scipy.stats.pearsonr(labels, predictions)[0])


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(scipy.stats.spearmanr(labels, predictions)[0])


def _f1(average: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda labels, predictions: sklearn.metrics.f1_score(labels, predictions, average=average, zero_division=0)


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": sklearn.metrics.accuracy_score,  # subset accuracy for multi-label examples
    "f1": _f1("binary"),
    "macro_f1": _f1("macro"),
    "micro_f1": _f1("micro"),
    "matthews": sklearn.metrics.matthews_corrcoef,
    "pearson": _pearson,
    "spearman": _spearman,
}
# {objective: its scores}; "f1" is that of class 1 of two.
FITTING = {
    "softmax": ("accuracy", "f1", "macro_f1", "micro_f1", "matthews"),
    "sigmoid": ("accuracy", "f1", "macro_f1", "micro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Evaluates a classification task on every example of a dataset, each once.

    Attributes:
      task: its `metrics` and `predict` are run on each batch.
      mesh: the device mesh.
      data: the evaluation data.
      scores: names from SCORES; "loss" is always among the results.
    """

    task: Task
    mesh: Mesh
    data: Dataset
    scores: tuple[str, ...] = ("accuracy",)

    def __post_init__(self):
        for name in self.scores:
            if name not in SCORES:
                raise UserError(f"scores: unknown score '{name}'{nearest(name, SCORES)}")
        objective = getattr(self.task, "objective", None)
        outputs = getattr(self.task.model, "num_outputs", None)
        binary = outputs == (1 if objective == "sigmoid" else 2)
        fitting = [
            name
            for name in FITTING.get(str(objective), SCORES)
            if (name != "f1" or binary) and (name != "matthews" or objective == "softmax" or binary)
        ]
        for name in self.scores:
            if name not in fitting:
                raise UserError(
                    f"scores: '{name}' is not defined for '{objective}' with {outputs} outputs; use {fitting}"
                )

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> Mapping[str, float | np.ndarray]:
        """Return {score: value}; correlations and F1 as fractions, not percentages."""
        return self._scored(*self._outputs(self.data, params, check))

    def _outputs(self, data: Dataset, params: Params, check: Callable[[], None]) -> tuple[float, dict[str, np.ndarray]]:
        """Return the loss, and what `_batch` returns for every real example of `data`, in order."""
        outputs = list(batches.run(self._batch, params, data, self.mesh, check))
        loss = merge([{"loss": means["loss"]} for means, _ in outputs])["loss"].compute()
        columns: dict[str, Any] = {k: np.concatenate([rows[k] for _, rows in outputs]) for k in outputs[0][1]}
        real = columns.pop("mask") > 0
        return float(loss), {name: column[real] for name, column in columns.items()}

    def _scored(self, loss: float, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
        labels, predictions = columns["target"], columns["prediction"]
        return {"loss": loss} | {name: float(SCORES[name](labels, predictions)) for name in self.scores}

    def _batch(self, params: Params, batch: Batch) -> tuple[dict[str, Mean], dict[str, jax.Array]]:
        outputs = self.task.predict(params, batch, jax.random.key(0))
        prediction = outputs["label"] if "label" in outputs else outputs["logits"][:, 0]
        rows = {"prediction": prediction, "target": batch["label"], "mask": batch["mask"]}
        return self.task.metrics(params, batch), rows
