"""Records how well each score ranks candidates by their accuracy after fine-tuning, and draws both.

    python experiments/choosing/compare.py runs/choosing

The folder holds ranking/, which --mode=choose has written, and tuned/, with a finished run for every candidate.
"""

import argparse
import pathlib
from importlib.metadata import version

import matplotlib
import numpy as np
import scipy.stats

matplotlib.use("agg")
from matplotlib import pyplot

from research.analysis.transferability import TITLES
from research.errors import UserError
from research.reporting import benchmark, runs
from research.reporting.figures import COLOURS, DOTS_PER_INCH
from research.reporting.record import read_json
from research.reporting.runs import Run

HERE = pathlib.Path(__file__).resolve().parent
ACCURACY, TESTED = "test/accuracy", 1057  # rows of the test set
DRAWS = 1000


def correlations(scores: np.ndarray, accuracies: np.ndarray) -> dict[str, float]:
    """Return the rank correlations of scores [M] with accuracies [M], and what the first by score loses to the best."""
    return {
        "weighted_tau": float(scipy.stats.weightedtau(scores, accuracies).statistic),
        "kendall_tau": float(scipy.stats.kendalltau(scores, accuracies).statistic),
        "lost_accuracy": float(accuracies.max() - accuracies[scores.argmax()]),
    }


def interval(scores: np.ndarray, intervals: np.ndarray, accuracies: np.ndarray) -> tuple[float, float]:
    """Return 95 % of the weighted tau when scores and accuracies move by their errors, as normal ones."""
    rng = np.random.default_rng(0)
    deviations = (intervals[:, 1] - intervals[:, 0]) / (2 * 1.96)
    errors = np.sqrt(accuracies * (1 - accuracies) / TESTED)
    shape = (DRAWS, len(scores))
    drawn = zip(rng.normal(scores, deviations, shape), rng.normal(accuracies, errors, shape))
    low, high = np.percentile([scipy.stats.weightedtau(a, b).statistic for a, b in drawn], (2.5, 97.5))
    return float(low), float(high)


def draw(ranking: dict, accuracies: np.ndarray, path: pathlib.Path) -> None:
    """Draw the accuracies over the scores, a panel each, with the scores' intervals."""
    names = list(ranking["candidates"][0]["scores"])
    figure, panels = pyplot.subplots(1, len(names), figsize=(2.9 * len(names), 3.0), sharey=True, layout="constrained")
    for panel, name, colour in zip(panels, names, COLOURS):
        for candidate, accuracy in zip(ranking["candidates"], accuracies):
            score = candidate["scores"][name]
            panel.plot(score["interval"], [100 * accuracy] * 2, color=colour, alpha=0.5)
            panel.plot(score["value"], 100 * accuracy, "o", color=colour, markersize=4)
            label = pathlib.Path(candidate["name"]).name
            panel.annotate(label, (score["value"], 100 * accuracy), (3, 4), textcoords="offset points", fontsize=7)
        panel.set(xlabel=TITLES[name])
        panel.margins(x=0.15, y=0.1)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="test accuracy after fine-tuning, %")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, help="the folder of the ranking and the runs")
    folder = parser.parse_args().runs
    ranking = read_json(folder / "ranking" / "choose.json")
    if ranking is None:
        raise UserError(f"{folder / 'ranking'} holds no choose.json; run --mode=choose first")
    names = [pathlib.Path(candidate["name"]).name for candidate in ranking["candidates"]]
    tuned: list[Run] = [runs.load(folder / "tuned" / name) for name in names]
    accuracies = np.array([run.number(ACCURACY) for run in tuned])
    seconds = sum(run.number("train_seconds") for run in tuned)
    said = {"packages": {name: version(name) for name in ("numpy", "scipy")}, "start": tuned[0].run["start"]}
    for score in ranking["candidates"][0]["scores"]:
        found = [candidate["scores"][score] for candidate in ranking["candidates"]]
        values = np.array([row["value"] for row in found])
        numbers = correlations(values, accuracies)
        low, high = interval(values, np.array([row["interval"] for row in found]), accuracies)
        rows = [
            {"step": i, "score": value, "accuracy": accuracy}
            for i, (value, accuracy) in enumerate(zip(values.tolist(), accuracies.tolist()), start=1)
        ]
        config = {"candidates": names, "examples": ranking["examples"], "score": score}
        result = numbers | {"tau_low": low, "tau_high": high, "candidates": len(names), "train_seconds": seconds}
        benchmark.record(HERE / "runs" / score / "snippets", config, said, result, rows)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in result.items() if name != "train_seconds")
        print(f"{TITLES[score]}: {shown}")
    draw(ranking, accuracies, HERE / "scores.png")


if __name__ == "__main__":
    benchmark.exit_with(main)
