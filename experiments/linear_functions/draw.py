"""Draws the recorded runs' error over the number of examples beside least squares and averaging.

python experiments/linear_functions/draw.py
"""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

from research.data.linear_functions import linear_functions
from research.errors import UserError
from research.evaluators.in_context_regression import baselines, draw_errors
from research.reporting import benchmark, runs
from research.reporting.figures import BAND_ALPHA, COLOURS, DOTS_PER_INCH
from research.reporting.runs import Run

HERE = pathlib.Path(__file__).resolve().parent
ERROR, SOURCE = "test/error_after_", "evals.test.data.source."


def error(run: Run) -> np.ndarray:
    """Return a run's last error after 0, 1, ... examples."""
    points = sum(name.startswith(ERROR) for name in run.numbers)
    return np.array([run.number(f"{ERROR}{k}") for k in range(points)])


def estimates(run: Run) -> dict[str, np.ndarray]:
    """Return the errors of least squares and of averaging on the functions that a run was tested on."""
    arguments = {key.removeprefix(SOURCE): value for key, value in run.config.items() if key.startswith(SOURCE)}
    functions = linear_functions(**{key: value for key, value in arguments.items() if key != "call"})
    rows = [functions[i] for i in range(len(functions))]
    return baselines(*(np.stack([row[name] for row in rows]) for name in ("inputs", "outputs")))


def main() -> None:
    found = [runs.load(path) for path in sorted((HERE / "runs" / "decoder").glob("*/"))]
    if not found:
        raise UserError(f"{HERE / 'runs'} holds no records")
    errors_RxN, others = np.stack([error(run) for run in found]), [estimates(run) for run in found]
    curves = {"transformer": errors_RxN.mean(axis=0)}
    curves |= {name: np.mean([other[name] for other in others], axis=0) for name in others[0]}
    figure, (linear, logarithmic) = pyplot.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for axes in (linear, logarithmic):
        draw_errors(axes, curves)
        axes.fill_between(
            range(errors_RxN.shape[1]),
            errors_RxN.min(axis=0),
            errors_RxN.max(axis=0),
            color=COLOURS[0],
            alpha=BAND_ALPHA,
        )
    logarithmic.set(yscale="log", ylim=(1e-2, 8), ylabel="")
    logarithmic.get_legend().remove()
    figure.savefig(HERE / "by_examples.png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    for name, curve in curves.items():
        print(f"{name}: " + "  ".join(f"{value:.3f}" for value in curve))


if __name__ == "__main__":
    benchmark.exit_with(main)
