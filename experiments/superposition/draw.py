"""Draws what runs of configs/superposition.py learned: the products and the norms of the features' directions.

    python experiments/superposition/draw.py runs/superposition

The folder holds ARM/seed-0 for every arm, with its checkpoint.
"""

import argparse
import pathlib

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

from research.errors import UserError
from research.evaluators.superposition import draw_norms, draw_products
from research.experiment import Experiment
from research.reporting import benchmark
from research.reporting.claims import read_claim
from research.reporting.figures import DOTS_PER_INCH
from research.reporting.record import load_config

HERE = pathlib.Path(__file__).resolve().parent


def kernel(folder: pathlib.Path) -> np.ndarray:
    """Return a run's last kernel, [features, hidden dimensions]."""
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} holds no finished run")
    experiment = Experiment(load_config(folder), workdir=folder)
    experiment.build()
    checkpoints = experiment.checkpoints(folder)
    try:
        found = checkpoints.restore(experiment.abstract_state)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"{folder} has no checkpoint")
    return np.asarray(found[0].params["kernel"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, help="the folder of the runs")
    folder = parser.parse_args().runs
    arms = read_claim(HERE / "claim.toml").arms
    figure, axes = pyplot.subplots(2, len(arms), figsize=(3.0 * len(arms), 6.0), layout="constrained")
    for (arm, name), (upper, lower) in zip(arms.items(), axes.T):
        kernel_FxH = kernel(folder / arm / "seed-0")
        image = draw_products(upper, kernel_FxH)
        upper.set(title=name)
        draw_norms(lower, kernel_FxH)
        lower.set(title="", ylabel="feature" if upper is axes[0, 0] else "")
        if upper is not axes[0, 0]:
            upper.set(ylabel="")
            lower.get_legend().remove()
    figure.colorbar(image, ax=axes[0], shrink=0.75, aspect=12, label="product of directions")
    figure.savefig(HERE / "directions.png", dpi=DOTS_PER_INCH, metadata={"Software": None})


if __name__ == "__main__":
    benchmark.exit_with(main)
