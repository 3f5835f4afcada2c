"""Gathers the runs of the sweep over widths and rates into one record for each parametrisation, and draws them.

    python experiments/mup/collect.py runs/mup

The folder holds mup/ and standard/, with a finished run for every width and rate.
"""

import argparse
import math
import pathlib
from collections.abc import Mapping

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from research.errors import UserError
from research.reporting import benchmark, runs
from research.reporting.figures import COLOURS, DOTS_PER_INCH
from research.reporting.runs import Run

HERE = pathlib.Path(__file__).resolve().parent
ARMS = {"mup": "muP", "standard": "standard parametrisation"}
LOSS, WIDTH, RATE = "validation/loss", "task.model.hidden_size", "optimizer.learning_rate"

Losses = Mapping[int, Mapping[float, float]]  # width -> rate -> loss


def losses(found: list[Run]) -> Losses:
    """Return the final losses by width and rate."""
    table: dict[int, dict[float, float]] = {}
    for run in found:
        table.setdefault(run.config[WIDTH], {})[run.config[RATE]] = run.number(LOSS)
    return {width: dict(sorted(table[width].items())) for width in sorted(table)}


def best(by_rate: Mapping[float, float]) -> float:
    """Return the rate of the least loss."""
    return min(by_rate, key=lambda rate: by_rate[rate])


def result(table: Losses) -> dict[str, float]:
    """Return how far the best rate moves from the narrowest to the widest model, and what that costs the widest."""
    narrow, wide = table[min(table)], table[max(table)]
    return {
        "octaves": abs(math.log2(best(wide) / best(narrow))),
        "transferred_loss": wide[best(narrow)],
        "best_loss": min(wide.values()),
    }


def draw(tables: Mapping[str, Losses], path: pathlib.Path) -> None:
    """Draw the losses over the rates, a panel for each parametrisation and a line for each width."""
    figure, axes = pyplot.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.2), sharey=True, layout="constrained")
    for panel, (arm, table) in zip(axes, tables.items()):
        for colour, (width, by_rate) in zip(COLOURS, table.items()):
            panel.plot([*by_rate], [*by_rate.values()], "o-", color=colour, label=f"{width} wide", markersize=4)
            panel.plot(best(by_rate), by_rate[best(by_rate)], "o", color=colour, markersize=9, fillstyle="none")
        panel.set(xscale="log", xlabel="learning rate", title=ARMS[arm])
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    lowest = min(loss for table in tables.values() for by_rate in table.values() for loss in by_rate.values())
    axes[0].set(ylabel="validation loss, nats a byte", ylim=(lowest - 0.05, lowest + 1.0))
    axes[0].legend()
    figure.savefig(path, dpi=DOTS_PER_INCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, help="the folder of the runs")
    folder = parser.parse_args().runs
    tables = {}
    for arm in ARMS:
        found = [runs.load(path) for path in sorted((folder / arm).glob("*/"))]
        if not found:
            raise UserError(f"{folder / arm} holds no runs")
        tables[arm] = losses(found)
        rows = [
            {"step": i, "width": run.config[WIDTH], "learning_rate": run.config[RATE], LOSS: run.number(LOSS)}
            for i, run in enumerate(found, start=1)
        ]
        seconds = sum(run.number("train_seconds") for run in found)
        numbers = result(tables[arm]) | {"train_seconds": seconds, "runs": len(found)}
        shared = {key: value for key, value in found[0].config.items() if key not in (WIDTH, RATE)}
        benchmark.record(HERE / "runs" / arm / "sweep", shared, dict(found[0].run), numbers, rows)
        for width, by_rate in tables[arm].items():
            shown = "  ".join(f"{rate:g}: {loss:.3f}" for rate, loss in by_rate.items())
            print(f"{ARMS[arm]}, {width} wide: best rate {best(by_rate):g}  ({shown})")
    draw(tables, HERE / "rates.png")


if __name__ == "__main__":
    benchmark.exit_with(main)
