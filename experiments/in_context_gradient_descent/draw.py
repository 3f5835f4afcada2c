"""Draws how the recorded runs' trained layers come to differ less and less from one step of gradient descent.

python experiments/in_context_gradient_descent/draw.py
"""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

from research.errors import UserError
from research.reporting import benchmark, runs
from research.reporting.figures import COLOURS, DOTS_PER_INCH
from research.reporting.runs import Run

HERE = pathlib.Path(__file__).resolve().parent


def curve(run: Run, name: str) -> np.ndarray:
    """Return a metric of the run's evaluations, [evaluations]."""
    return np.array([row[f"test/{name}"] for row in run.rows if "test/loss" in row])


def main() -> None:
    found = [runs.load(path) for path in sorted((HERE / "runs" / "trained").glob("*/"))]
    if not found:
        raise UserError(f"{HERE / 'runs'} holds no records")
    figure, axes = pyplot.subplots(1, 3, figsize=(10.8, 3.0), layout="constrained")
    for colour, run in zip(COLOURS, found):
        steps = [row["step"] for row in run.rows if "test/loss" in row]
        shown = {
            "squared error, relative to the step's, less 1": curve(run, "loss") / curve(run, "step_loss") - 1,
            "distance of sensitivities": curve(run, "sensitivity_difference"),
            "1 - cosine of sensitivities": 1 - curve(run, "sensitivity_cosine"),
        }
        for panel, (title, values) in zip(axes, shown.items()):
            panel.plot(steps, values, "o-", color=colour, markersize=3, linewidth=1.2, label=run.path.name)
            panel.set_title(title, fontsize=10)
    for panel in axes:
        panel.set(yscale="log", xlabel="optimizer step")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "differences.png", dpi=DOTS_PER_INCH, metadata={"Software": None})


if __name__ == "__main__":
    benchmark.exit_with(main)
