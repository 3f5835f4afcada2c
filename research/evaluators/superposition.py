"""How many features a toy model of superposition represents, and how they share its dimensions (Elhage 2022)."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from research.data.dataset import Dataset
from research.evaluators.means import Means
from research.reporting import pictures
from research.reporting.figures import COLOURS
from research.task import Params
from research.tasks.feature_reconstruction import FeatureReconstruction

KINDS = {"nearly alone": COLOURS[0], "in superposition": COLOURS[1], "not represented": "0.6"}
REPRESENTED = 0.5  # the least norm of a feature's direction that counts; norms lie near 0 or 1


@dataclasses.dataclass(frozen=True)
class Superposition:
    """A `FeatureReconstruction`'s loss on a dataset, and what its kernel says of superposition.

    Attributes:
      task: the task to evaluate.
      mesh: the device mesh.
      data: the evaluation data.
    """

    task: FeatureReconstruction
    mesh: Mesh
    data: Dataset

    def __call__(self, params: Params, check: Callable[[], None] = lambda: None) -> Mapping[str, float | np.ndarray]:
        """Return "loss", the numbers of `measures` and the picture "superposition"."""
        kernel_FxH = np.asarray(params["kernel"], np.float64)
        means = Means(self.task, self.mesh, self.data)(params, check)
        return {**means, **measures(kernel_FxH), "superposition": draw(kernel_FxH)}


def measures(kernel_FxH: np.ndarray) -> dict[str, float]:
    """Return what the directions of features, the rows of a kernel [F, H], say of superposition.

    Returns:
      "represented_features", those whose direction has a norm above 0.5; "dimensions_per_feature", H over the squared
      Frobenius norm (section "The geometry of superposition"), which is 1 where as many features as there are
      dimensions have one each; "interference", the mean over represented features of the sum of squared products of
      their unit direction with the other directions (the colour in the figures of "Demonstrating superposition"), 0
      where they are orthogonal.
    """
    norms_F = np.linalg.norm(kernel_FxH, axis=1)
    represented_F = norms_F > REPRESENTED
    interference_F = interference(kernel_FxH)
    return {
        "represented_features": float(represented_F.sum()),
        "dimensions_per_feature": float(kernel_FxH.shape[1] / np.square(norms_F).sum()),
        "interference": float(interference_F[represented_F].mean()) if represented_F.any() else 0.0,
    }


def interference(kernel_FxH: np.ndarray) -> np.ndarray:
    """Return for each row of [F, H] the sum of squared products of its unit vector with the others, [F]."""
    units_FxH = kernel_FxH / np.maximum(np.linalg.norm(kernel_FxH, axis=1, keepdims=True), 1e-12)
    products_FxF = units_FxH @ kernel_FxH.T
    return np.square(products_FxF).sum(axis=1) - np.square(np.diagonal(products_FxF))


def draw(kernel_FxH: np.ndarray) -> np.ndarray:
    """Draw W^T W and the norms of the features' directions."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.colorbar(draw_products(left, kernel_FxH), ax=left, shrink=0.8)
    draw_norms(right, kernel_FxH)
    return pictures.render(figure)


def draw_products(axes: Axes, kernel_FxH: np.ndarray) -> AxesImage:
    """Draw W^T W [F, F] and return what a colour bar is made of."""
    axes.set(title="products of directions", xlabel="feature", ylabel="feature")
    axes.set_xticks(range(0, len(kernel_FxH), 5))
    axes.set_yticks(range(0, len(kernel_FxH), 5))
    return axes.imshow(kernel_FxH @ kernel_FxH.T, cmap="RdBu", vmin=-1, vmax=1)


def draw_norms(axes: Axes, kernel_FxH: np.ndarray) -> None:
    """Draw the norm of each feature's direction, coloured by whether it is represented, and shares its dimensions."""
    norms_F = np.linalg.norm(kernel_FxH, axis=1)
    represented_F, crowded_F = norms_F > REPRESENTED, interference(kernel_FxH) > REPRESENTED
    kinds_F = np.where(represented_F, np.where(crowded_F, 1, 0), 2)
    axes.barh(range(len(norms_F)), norms_F, color=[list(KINDS.values())[kind] for kind in kinds_F])
    axes.axvline(REPRESENTED, color="0.4", linestyle="--", linewidth=1)
    axes.set(title="norms of directions", xlabel="norm", ylim=(len(norms_F) - 0.5, -0.5), xlim=(0, 1.35))
    axes.set_yticks(range(0, len(norms_F), 5))
    axes.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in KINDS.items()], fontsize=8, loc="lower right"
    )
