"""Fits the law of compute-optimal scaling to simulated losses, and to runs of small models on bytes.

    python experiments/scaling_law/fit.py runs/isoflop

Simulated are 240 runs, with compute and sizes drawn evenly on a logarithmic scale over Chinchilla's ranges (6e18 to
3e21 operations, 63 million to 16 billion parameters), whose losses follow published constants but for noise of 0.3 %.
The folder holds finished runs of configs/isoflop.py, COMPUTE/RUN; where it is left out, only simulations are fitted.
"""

import argparse
import datetime
import pathlib
import runpy
import statistics
from importlib.metadata import version

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

from research.analysis import scaling_laws
from research.analysis.scaling_laws import BESIROGLU, HOFFMANN, Law
from research.errors import UserError
from research.reporting import benchmark, runs
from research.reporting.figures import COLOURS, DOTS_PER_INCH

HERE = pathlib.Path(__file__).resolve().parent
LAWS = {"refit": BESIROGLU, "first": HOFFMANN}
SEEDS, RUNS, NOISE = 3, 240, 0.003
GOPHER = 5.76e23  # operations that Chinchilla was trained with
CONFIG = HERE.parents[1] / "configs" / "isoflop.py"
LOSS = "validation/loss"

Points = dict[float, list[tuple[int, float, float]]]  # compute -> (parameters, tokens, loss)


def simulate(law: Law, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return parameters, tokens and losses of simulated runs."""
    rng = np.random.default_rng(seed)
    compute = np.exp(rng.uniform(np.log(6e18), np.log(3e21), RUNS))
    parameters = np.exp(rng.uniform(np.log(6.3e7), np.log(1.6e10), RUNS))
    tokens = compute / 6 / parameters
    return parameters, tokens, law.loss(parameters, tokens) * np.exp(rng.normal(0, NOISE, RUNS))


def numbers(law: Law) -> dict[str, float]:
    """Return what is compared of a law."""
    parameters, tokens = law.optimal(GOPHER)
    constants = {"E": law.irreducible, "A": law.size_factor, "B": law.data_factor}
    constants |= {"alpha": law.size_exponent, "beta": law.data_exponent}
    return {"optimal_exponent": law.optimal_exponent, "tokens_per_parameter": tokens / parameters, **constants}


def record(arm: str, name: str, config: dict, result: dict, rows: list, start: datetime.datetime) -> None:
    """Record a fit as a run of an arm, and print it."""
    packages = {name: version(name) for name in ("numpy", "scipy")}
    said = {"packages": packages, "start": start.isoformat(timespec="seconds")}
    seconds = (datetime.datetime.now(datetime.UTC) - start).total_seconds()
    benchmark.record(HERE / "runs" / arm / name, config, said, result | {"train_seconds": seconds}, rows)
    print(f"{arm} {name}: " + "  ".join(f"{key} {value:.4g}" for key, value in result.items()), flush=True)


def trained(folder: pathlib.Path) -> Points:
    """Return the runs of small models by their compute."""
    points: Points = {}
    count = runpy.run_path(str(CONFIG))["parameters"]
    for path in sorted(folder.glob("*/*/")):
        run = runs.load(path)
        size = count(run.config["task.model.hidden_size"])
        tokens = run.number("step") * run.config["batch_size"] * run.config["data.pack"]
        points.setdefault(float(path.parent.name), []).append((size, tokens, run.number(LOSS)))
    if not points:
        raise UserError(f"{folder} holds no runs")
    return {compute: sorted(points[compute]) for compute in sorted(points)}


def fit_trained(points: Points) -> dict[str, float]:
    """Return the exponents of the best size over compute, by parabolas near the best runs and by the parametric law."""
    best = {compute: scaling_laws.best_size(*np.array(found)[:, [0, 2]].T) for compute, found in points.items()}
    slope = np.polyfit(np.log([*best]), np.log([*best.values()]), 1)[0]
    law = scaling_laws.fit(*np.array([point for found in points.values() for point in found]).T)
    ratio = statistics.fmean(compute / 6 / size**2 for compute, size in best.items())
    return {
        "optimal_exponent": float(slope),
        "tokens_per_parameter": ratio,
        "parametric_exponent": law.optimal_exponent,
        "E": law.irreducible,
    }


def draw(points: Points, path: pathlib.Path) -> None:
    """Draw the losses over the sizes, a line for each compute, with their parabolas and minima."""
    figure, axes = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")
    for colour, (compute, found) in zip(COLOURS, points.items()):
        sizes, _, losses = np.array(found).T
        axes.plot(sizes, losses, "o-", color=colour, linewidth=1, label=f"{compute:.0e} operations")
        axes.axvline(scaling_laws.best_size(sizes, losses), color=colour, linestyle=":")
    axes.set(xscale="log", xlabel="parameters", ylabel="validation loss, nats a byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=DOTS_PER_INCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="?", help="the folder of the runs")
    folder = parser.parse_args().runs
    for arm, law in LAWS.items():
        for seed in range(SEEDS):
            start = datetime.datetime.now(datetime.UTC)
            fitted = scaling_laws.fit(*simulate(law, seed))
            record(arm, f"seed-{seed}", {"seed": seed, "noise": NOISE, "runs": RUNS}, numbers(fitted), [], start)
    if folder:
        start = datetime.datetime.now(datetime.UTC)
        points = trained(folder)
        rows = [
            {"compute": compute, "parameters": size, "tokens": tokens, LOSS: loss}
            for compute, found in points.items()
            for size, tokens, loss in found
        ]
        rows = [{"step": i, **row} for i, row in enumerate(rows, start=1)]
        record("bytes", "isoflop", {"config": "configs/isoflop.py"}, fit_trained(points), rows, start)
        draw(points, HERE / "isoflop.png")


if __name__ == "__main__":
    benchmark.exit_with(main)
