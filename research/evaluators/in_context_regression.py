"""What a model learned in context, beside estimators of linear functions and one step of gradient descent."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from research.analysis.linear_regression import averaging, best_rate, gradient_step, least_squares
from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators import batches
from research.reporting import pictures
from research.reporting.figures import COLOURS
from research.task import Batch, Params
from research.tasks.in_context_regression import InContextRegression

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Evaluator:
    """What both share.

    Attributes:
      task: the task to evaluate.
      mesh: the device mesh.
      data: the evaluation data.
    """

    task: InContextRegression
    mesh: Mesh
    data: Dataset

    def _columns(self, params: Params, check: Callable[[], None]) -> Columns:
        """Return the rows that count, of all batches: inputs [B, N, D], outputs [B, N] and the outputs of `_batch`."""
        found = list(batches.run(self._batch, params, self.data, self.mesh, check))
        mask = np.concatenate([rows["mask"] for rows in found]) > 0
        return {name: np.concatenate([rows[name] for rows in found])[mask] for name in found[0]}

    def _batch(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        return {**batch, **self.task.predict(params, batch, jax.random.key(0))}


@dataclasses.dataclass(frozen=True)
class ErrorByExamples(_Evaluator):
    """The squared error after 0, 1, ... examples, over the number of dimensions (Garg 2022, figure 2).

    So normalised, predicting 0 has an error of 1 where inputs are of variance 1. The model predicts all points.
    """

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> Mapping[str, float | np.ndarray]:
        """Return "loss", "error_after_K" for every K, and the picture "by_examples".

        "excess" is the mean over K of the error less that of least squares, which no estimator can better: where there
        are fewer examples than dimensions, its solution of least norm is the mean of the weights that they leave
        possible.

        Raises:
          UserError: the model predicts fewer points.
        """
        columns = self._columns(params, check)
        inputs_BxNxD, outputs_BxN, predictions_BxP = (columns[name] for name in ("inputs", "outputs", "predictions"))
        if predictions_BxP.shape != outputs_BxN.shape:
            raise UserError(
                f"config.evals: {type(self.task.model).__name__} predicts {predictions_BxP.shape[1]} of "
                f"{outputs_BxN.shape[1]} points; errors by examples need all"
            )
        error_N = normalised_error(predictions_BxP, inputs_BxNxD, outputs_BxN)
        estimates = baselines(inputs_BxNxD, outputs_BxN)
        numbers = {f"error_after_{k}": float(error) for k, error in enumerate(error_N)}
        loss = float(error_N.mean() * inputs_BxNxD.shape[2])
        excess = float((error_N - estimates["least squares"]).mean())
        return {"loss": loss, "excess": excess, **numbers, "by_examples": draw({"transformer": error_N, **estimates})}


def baselines(inputs_BxNxD: np.ndarray, outputs_BxN: np.ndarray) -> dict[str, np.ndarray]:
    """Return the normalised errors [N] of the estimators that a model is compared with (Garg 2022, section 3.1)."""
    estimators = {"least squares": least_squares, "averaging": averaging}
    return {
        name: normalised_error(estimate(inputs_BxNxD, outputs_BxN), inputs_BxNxD, outputs_BxN)
        for name, estimate in estimators.items()
    }


def normalised_error(predictions_BxN: np.ndarray, inputs_BxNxD: np.ndarray, outputs_BxN: np.ndarray) -> np.ndarray:
    """Return the mean squared error of each point over the number of dimensions, [N]."""
    return np.square(predictions_BxN - outputs_BxN).mean(axis=0) / inputs_BxNxD.shape[2]


@dataclasses.dataclass(frozen=True)
class GradientDescent(_Evaluator):
    """A model that predicts the last point beside one step of gradient descent on the others (von Oswald 2023, fig. 2).

    The step starts at 0 and has the learning rate that is best on the evaluation data themselves.
    """

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> Mapping[str, float]:
        """Return the model's "loss", and how it differs from the step.

        "step_loss" is the step's loss at the rate "step_rate". "prediction_difference" is the mean distance of both
        predictions. A sensitivity is the gradient of a prediction with respect to the last input, for the step its
        weights: "sensitivity_difference" is the mean distance of both, "sensitivity_cosine" the mean of their cosine.
        """
        columns = self._columns(params, check)
        inputs_BxNxD, outputs_BxN = columns["inputs"].astype(np.float64), columns["outputs"].astype(np.float64)
        targets_B, predictions_B = outputs_BxN[:, -1], columns["predictions"][:, -1]
        sensitivities_BxD, last_BxD = columns["sensitivities"], inputs_BxNxD[:, -1]
        weights_BxD = gradient_step(inputs_BxNxD, outputs_BxN)
        rate = best_rate((weights_BxD * last_BxD).sum(axis=-1), targets_B)
        weights_BxD *= rate
        steps_B = (weights_BxD * last_BxD).sum(axis=-1)
        norms_B = np.linalg.norm(weights_BxD, axis=-1) * np.linalg.norm(sensitivities_BxD, axis=-1)
        cosines_B = (weights_BxD * sensitivities_BxD).sum(axis=-1) / np.maximum(norms_B, 1e-12)
        return {
            "loss": float(np.square(predictions_B - targets_B).mean()),
            "step_loss": float(np.square(steps_B - targets_B).mean()),
            "step_rate": rate,
            "prediction_difference": float(np.abs(predictions_B - steps_B).mean()),
            "sensitivity_difference": float(np.linalg.norm(weights_BxD - sensitivities_BxD, axis=-1).mean()),
            "sensitivity_cosine": float(cosines_B.mean()),
        }

    def _batch(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        def predict(inputs_BxNxD: jax.Array) -> jax.Array:
            return self.task.predict(params, {**batch, "inputs": inputs_BxNxD}, jax.random.key(0))["predictions"].sum()

        return {**super()._batch(params, batch), "sensitivities": jax.grad(predict)(batch["inputs"])[:, -1]}


def draw(curves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draw errors over the number of examples, a line for each estimator."""
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    draw_errors(figure.subplots(), curves)
    return pictures.render(figure)


def draw_errors(axes: Axes, curves: Mapping[str, np.ndarray]) -> None:
    """Draw errors [N] over the number of examples into `axes`, up to 1.5, as averaging begins far above."""
    for colour, dash, (name, curve) in zip(COLOURS, ("o-", "s--", "^:"), curves.items()):
        axes.plot(curve, dash, color=colour, label=name, markersize=4, linewidth=1.6)
    axes.set(xlabel="examples in context", ylabel="squared error / dimensions", ylim=(-0.05, 1.5))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
