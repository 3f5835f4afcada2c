"""Finished runs, read back from their folders, and what several of them have in common."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Run:
    """The records of one finished run.

    Attributes:
      path: its folder.
      config: config.json, flat: {"optimizer.learning_rate": 5e-5}.
      run: run.json.
      rows: the lines of metrics.jsonl.
      result: result.json.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    run: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]

    @property
    def numbers(self) -> dict[str, float]:
        """What the run ended with: its final metrics, then the numbers beside them, such as examples_per_second."""
        beside = {key: value for key, value in self.result.items() if key != "metrics"}
        return {k: v for k, v in {**self.result["metrics"], **beside}.items() if isinstance(v, int | float)}

    def number(self, metric: str) -> float:
        """Return one of `numbers`.

        Raises:
          UserError: the run did not end with that metric.
        """
        if metric not in self.numbers:
            raise UserError(f"{self.path} ended without '{metric}'{nearest(metric, self.numbers)}")
        return self.numbers[metric]


def load(path: pathlib.Path) -> Run:
    """Read a run's folder.

    Raises:
      UserError: there is no such folder, its run has not finished, or a file in it is not what it should be.
    """
    if not path.is_dir():
        siblings = [str(path.parent / other.name) for other in path.parent.glob("*") if other.is_dir()]
        raise UserError(f"there is no run folder {path}{nearest(str(path), siblings)}")
    if not (path / "config.json").exists():
        raise UserError(f"{path} holds no run (it has no config.json)")
    if not (path / "result.json").exists():
        raise UserError(f"{path} holds a run that has not finished (it has no result.json)")
    result = _object(path / "result.json")
    if not isinstance(result.get("metrics"), dict):
        raise UserError(f"{path / 'result.json'} has no 'metrics'")
    config = flatten(_object(path / "config.json"))
    return Run(path, config, _object(path / "run.json"), _rows(path / "metrics.jsonl"), result)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"a.b.0.c": value} for nested mappings and lists of mappings; other lists stay whole."""
    if isinstance(node, Mapping) and node:
        items = node.items()
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        items = ((str(i), item) for i, item in enumerate(node))  # type: ignore[assignment]
    else:
        return {prefix.removesuffix("."): node}
    return {key: value for name, item in items for key, value in flatten(item, f"{prefix}{name}.").items()}


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: the end of its path, as short as tells them apart."""
    parts = [run.path.absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(run.path for i, run in enumerate(runs) if parts[i] in parts[:i])
    raise UserError(f"{twice} is named twice")


def group_by_config(runs: Sequence[Run]) -> list[list[int]]:
    """Return the positions of runs that differ in nothing but `seed`, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for position, run in enumerate(runs):
        config = {key: value for key, value in run.config.items() if key != "seed"}
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(position)
    return list(groups.values())


def show(metric: str, value: float) -> str:
    """Return a number as people read it: an accuracy in per cent, bytes in GiB, else 4 significant digits."""
    if is_share(metric):
        return f"{100 * value:.2f} %"
    if metric.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1e4 else f"{value:.4g}"


def show_mean(metric: str, values: Sequence[float]) -> str:
    """Return "mean ± sample deviation" of several values, or the one value there is."""
    mean = statistics.fmean(values) if len(values) > 1 else values[0]
    return show(metric, mean) + (f" ± {show_deviation(metric, values)}" if len(values) > 1 else "")


def show_deviation(metric: str, values: Sequence[float]) -> str:
    """Return the sample deviation of several values, with two significant digits; a dash for one."""
    if len(values) < 2:
        return "-"
    deviation = statistics.stdev(values)
    if is_share(metric):
        return f"{100 * deviation:.2f}"
    return show(metric, deviation) if metric.endswith("_bytes") else f"{deviation:.2g}"


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of 1 that is shown in per cent."""
    return metric.endswith(("accuracy", "_share"))


def _object(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file that holds one object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line, each with a step."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}, is not a JSON object with a 'step'") from None
    return rows
