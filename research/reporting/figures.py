"""Figures as one would print them: training curves, and results over seeds. No display is needed."""

import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from research import storage

Rows = Sequence[Mapping[str, float]]  # the lines of a metrics.jsonl, each with its "step"
Points = tuple[np.ndarray, np.ndarray]  # the steps [n] and the values [n] of a curve

# Okabe and Ito's colours, which colour-blind readers tell apart too (without the yellow).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
LABELS = {
    "examples_per_second": "examples / s",
    "tokens_per_second": "tokens / s",
    "peak_memory_bytes": "peak memory (bytes)",
    "train_seconds": "training time (s)",
    "compile_seconds": "compilation (s)",
}
DEFAULT_TRAIN_METRICS = ("train/loss", "train/learning_rate")
BAND_ALPHA = 0.2
PANEL_INCHES = (3.6, 2.7)
DOTS_PER_INCH = 150


def default_metrics(runs: Mapping[str, Rows]) -> list[str]:
    """Return the names worth a panel: training loss, learning rate and every evaluation metric."""
    names = metric_names(runs)
    evaluations = [name for name in names if "/" in name and not name.startswith("train/")]
    return [name for name in DEFAULT_TRAIN_METRICS if name in names] + evaluations


def metric_names(runs: Mapping[str, Rows]) -> list[str]:
    """Return every metric that some row of some run holds, in order of first appearance."""
    return list(dict.fromkeys(key for rows in runs.values() for row in rows for key in row if key != "step"))


def curves(
    runs: Mapping[str, Rows],
    metrics: Iterable[str] | None,
    path: str | pathlib.Path,
    *,
    groups: Mapping[str, str] | None = None,
    bands: bool = False,
    title: str = "",
) -> None:
    """Draw metrics over steps into the PNG file `path`, runs overlaid.

    Metrics that share their last name (train/loss, test/loss) share a panel. A training loss of
    many points is drawn twice: pale as it is, and as a running mean, which the legend names.

    Args:
      runs: name of a run -> its rows, as metrics.jsonl has them: {"step": 100, "train/loss": 0.6}.
        Values that are not finite are left out.
      metrics: names of metrics, in order; None chooses `default_metrics`. Names that no run has
        are left out; with nothing to draw the figure says so.
      path: where to write; its folder is made.
      groups: name of a run -> name of its group. A group shares a colour and a legend entry:
        seeds of one configuration. By default each run stands alone.
      bands: whether a group of several runs is one line, their mean, in a band of one sample deviation: see `band`;
        else each run is a line of its own.
      title: printed above the panels.
    """
    chosen = default_metrics(runs) if metrics is None else list(metrics)
    groups = dict(groups or {name: name for name in runs})
    panels: dict[str, list[str]] = {}
    for metric in chosen:
        if any(len(_points(rows, metric)[0]) for rows in runs.values()):
            panels.setdefault(metric.rsplit("/", 1)[-1], []).append(metric)

    figure, axes = _grid(max(1, len(panels)))
    if not panels:
        axes[0].text(0.5, 0.5, "nothing was logged yet", ha="center", transform=axes[0].transAxes)
        axes[0].set_axis_off()
    colours = _colours(dict.fromkeys(groups[name] for name in runs))
    last_step = max([1, *(row["step"] for rows in runs.values() for row in rows)])
    for panel, (leaf, members) in zip(axes, panels.items()):
        _draw_panel(panel, leaf, members, runs, groups, colours, bands)
        panel.set_xlim(-0.03 * last_step, 1.04 * last_step)  # the same in every panel
    handles: list[Artist] = []
    if len(colours) > 1:
        handles += [Line2D([], [], color=colours[name], label=name) for name in colours]
    if bands and len(colours) < len(runs):
        handles.append(Patch(color="0.3", alpha=BAND_ALPHA, label="mean ± sample deviation"))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            frameon=False,
            fontsize=9,
            ncols=min(len(handles), 2 if len(panels) < 3 else 4),
        )
    _save(figure, path, title)


def results(
    values: Mapping[str, Sequence[float]],
    metric: str,
    path: str | pathlib.Path,
    *,
    reference: tuple[str, float] | None = None,
    title: str = "",
) -> None:
    """Draw one final metric of several arms into the PNG file `path`: each run, mean, deviation.

    Args:
      values: name of an arm -> the metric of each of its runs.
      metric: the metric's name, for the axis.
      path: where to write; its folder is made.
      reference: (label, value) of a vertical line: a published number.
      title: printed above.
    """
    figure = Figure(figsize=(6.4, 1.4 + 0.5 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    for position, (colour, numbers) in enumerate(zip(_colours(values).values(), values.values())):
        _draw_arm(axes, position, np.asarray(numbers, float), colour)
    if reference:
        axes.axvline(reference[1], color="0.4", linestyle="--", linewidth=1, label=reference[0])
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    split, _, leaf = metric.rpartition("/")
    _name_axis(axes.xaxis, leaf, f" ({split})" if split else "")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.12)
    _style(axes)
    handles: list[Artist] = [
        Line2D([], [], color="0.35", marker="o", markersize=5, alpha=0.6, linestyle="", label="one run")
    ]
    if any(len(numbers) > 1 for numbers in values.values()):
        handles.append(
            Line2D([], [], color="0.35", marker="D", markersize=6, linewidth=1.5, label="mean ± sample deviation")
        )
    handles += axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path, title)


def _draw_arm(axes: Axes, position: int, numbers: np.ndarray, colour: str) -> None:
    axes.plot(numbers, np.full(len(numbers), position), "o", color=colour, alpha=0.5, markersize=6, markeredgewidth=0)
    if len(numbers) > 1:
        axes.errorbar(
            numbers.mean(),
            position,
            xerr=numbers.std(ddof=1),
            fmt="D",
            color=colour,
            markersize=6,
            capsize=4,
            linewidth=1.5,
        )


def _draw_panel(
    axes: Axes,
    leaf: str,
    metrics: Sequence[str],
    runs: Mapping[str, Rows],
    groups: Mapping[str, str],
    colours: Mapping[str, str],
    bands: bool,
) -> None:
    """Draw one panel; colour tells groups apart where there are several, else the metrics."""
    several = len(colours) > 1
    own_colours = _colours(metrics)
    legend: dict[str, Line2D] = {}
    for metric, dash in zip(metrics, DASHES * len(metrics)):
        for group in colours:
            points = [_points(rows, metric) for name, rows in runs.items() if groups[name] == group]
            points = [pair for pair in points if len(pair[0])]
            colour = colours[group] if several else own_colours[metric]
            for line in (_draw_group if bands else _draw_each)(axes, metric, points, colour, dash if several else "-"):
                legend.setdefault(str(line.get_label()), line)
    if list(legend) != [metrics[0]]:  # the title alone would not say it
        handles = [_sample(line, grey=several) for line in legend.values()]
        axes.legend(handles=handles, fontsize=8, edgecolor="none", framealpha=0.85)
    axes.set_title(metrics[0] if len(metrics) == 1 else leaf.replace("_", " "), fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=9)
    _name_axis(axes.yaxis, leaf)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _style(axes)


def _sample(line: Line2D, grey: bool) -> Line2D:
    """Return a line for a legend; grey where a colour stands for a group and not for a metric."""
    colour = "0.3" if grey else line.get_color()
    sample = Line2D([], [], color=colour, linewidth=1.6, label=str(line.get_label()))
    sample.set(linestyle=line.get_linestyle(), marker=line.get_marker(), markersize=4)
    return sample


def _draw_each(axes: Axes, metric: str, points: Sequence[Points], colour: str, dash: str) -> list[Line2D]:
    """Draw one metric of several runs, each by itself."""
    return [_draw_line(axes, metric, *pair, colour, dash) for pair in points]


def _draw_group(axes: Axes, metric: str, points: Sequence[Points], colour: str, dash: str) -> list[Line2D]:
    """Draw one metric of a group: its mean in a band; each run by itself where no step is common to them."""
    window = max((_window(metric, steps) for steps, _ in points), default=1)
    steps, mean, deviation = band(
        [(steps, _running_mean(numbers, min(window, len(steps)))) for steps, numbers in points]
    )
    if len(points) < 2 or not len(steps):
        return _draw_each(axes, metric, points, colour, dash)
    width = 4 if len(steps) == 1 else 0  # of its edge, as a band of one step has no area
    axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=BAND_ALPHA, linewidth=width)
    label = f"{metric}, mean of {window} points" if window > 1 else metric
    marker = _marker(metric, steps)
    return axes.plot(steps, mean, dash, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)


def band(points: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (steps [n], mean [n], sample deviation [n]) of runs' curves, over the steps that all of them cover.

    Between the points of a run its values are interpolated linearly, so that runs may have been logged at different
    steps. No point is left where no step is common to all. The deviation of one run is 0.

    Args:
      points: (steps [m], values [m]) of each run, by ascending step.
    """
    if not points or not all(len(steps) for steps, _ in points):
        return np.empty(0), np.empty(0), np.empty(0)
    first, last = max(steps[0] for steps, _ in points), min(steps[-1] for steps, _ in points)
    every = np.unique(np.concatenate([steps for steps, _ in points]))
    every = every[(every >= first) & (every <= last)]
    values = np.stack([np.interp(every, steps, numbers) for steps, numbers in points])
    deviation = values.std(axis=0, ddof=1) if len(points) > 1 else np.zeros(len(every))
    return every, values.mean(axis=0), deviation


def _window(metric: str, steps: np.ndarray) -> int:
    """Return how many neighbours a metric is averaged over; a training loss is one of many noisy points."""
    return max(1, len(steps) // 20) if metric == "train/loss" else 1


def _marker(metric: str, steps: np.ndarray) -> str:
    return "o" if len(steps) == 1 or (len(steps) <= 30 and not metric.startswith("train/")) else ""


def _draw_line(axes: Axes, metric: str, steps: np.ndarray, numbers: np.ndarray, colour: str, dash: str) -> Line2D:
    """Draw one metric of one run and return the line that stands for it in the legend."""
    window = _window(metric, steps)
    if window > 1:
        axes.plot(steps, numbers, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{metric}, mean of {window} points"
        return axes.plot(steps, _running_mean(numbers, window), dash, color=colour, linewidth=1.6, label=label)[0]
    marker = _marker(metric, steps)
    return axes.plot(steps, numbers, dash, color=colour, marker=marker, markersize=4, linewidth=1.6, label=metric)[0]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over `window` neighbours, fewer at the ends; values [n] -> [n]."""
    kernel = np.ones(window)
    total = np.convolve(values, kernel, "same")
    return total / np.convolve(np.ones_like(values), kernel, "same")


def _points(rows: Rows, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps [n], values [n]) of a metric's finite values, by ascending step."""
    pairs = [
        (row["step"], row[metric])
        for row in rows
        if isinstance(row.get(metric), int | float) and math.isfinite(row[metric])
    ]
    pairs.sort(key=lambda pair: pair[0])
    array = np.asarray(pairs, float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, at most three a row."""
    columns = min(count, 3) if count != 4 else 2
    lines = math.ceil(count / columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(count)]


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _name_axis(axis: Axis, leaf: str, where: str = "") -> None:
    """Labels an axis with a metric's last name and its unit."""
    axis.set_label_text(LABELS.get(leaf, leaf.replace("_", " ")) + where, fontsize=9)
    if leaf.endswith("accuracy"):
        axis.set_major_formatter(PercentFormatter(1.0))


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        if isinstance(formatter := axis.get_major_formatter(), ScalarFormatter):
            formatter.set_powerlimits((-3, 5))
            formatter.set_useMathText(True)


def _save(figure: Figure, path: str | pathlib.Path, title: str) -> None:
    """Write a PNG that holds no date and no version, so that the same data give the same file."""
    if title:
        figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=11)
    with storage.writing(storage.path(path)) as file:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
