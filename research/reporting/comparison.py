"""Groups of runs, what their metrics are on average, and by how much the groups differ.

An interval at 95 % is Student's t over the runs of a group. That of a difference is over pairs of runs of the same
seed, as pairs share what the seed decides, such as the order of the data; where too few pairs exist it is Welch's
(1947), over both groups as they are. With the few seeds that one can afford, resampling them gives intervals that are
too narrow, so none is resampled here.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import scipy.stats

from research.errors import UserError, nearest
from research.reporting import claims, runs
from research.reporting.runs import Run

LEVEL = 0.95
MISSING = "-"  # a config's value of a key that it does not have


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that agree in what they are compared by.

    Attributes:
      name: what tables and legends call it.
      members: label of a run -> the run.
    """

    name: str
    members: Mapping[str, Run]

    def values(self, metric: str) -> list[float]:
        """Return a metric of the runs that ended with it, and with a finite one, in their order."""
        return [run.numbers[metric] for run in self.members.values() if _has(run, metric)]

    def show(self, key: str) -> str:
        """Return the values of a config's key, each once."""
        return ", ".join(dict.fromkeys(_value(run, key) for run in self.members.values()))


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its interval at 95 %.

    Attributes:
      center: the estimate.
      half_width: of the interval; None where there are too few runs for one.
      over: what it was estimated from, such as "3 runs" or "3 pairs".
    """

    center: float
    half_width: float | None
    over: str

    @property
    def low(self) -> float:
        """The lower end; not a number where there is no interval."""
        return self.center - (math.nan if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        """The upper end; not a number where there is no interval."""
        return self.center + (math.nan if self.half_width is None else self.half_width)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as plain text; the first cell of a row names it.

    Attributes:
      title: what it shows.
      columns: the names of all columns but the first.
      rows: the cells of each row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def make_groups(found: Sequence[Run], keys: Sequence[str] | None = None) -> list[Group]:
    """Divide runs into groups, in the order in which their first runs are named.

    Args:
      found: the runs.
      keys: keys of the flat config, as "optimizer.learning_rate", in which the runs of a group agree; None: all but the
        seed.

    Raises:
      UserError: no run has such a key, or a run is named twice.
    """
    labels = runs.labels(found)
    if keys is None:
        members = runs.group_by_config(found)
        return [Group(_first_and_more(labels, each), {labels[i]: found[i] for i in each}) for each in members]
    known = dict.fromkeys(key for run in found for key in run.config)
    for key in keys:
        if key not in known:
            raise UserError(f"--group: no run's config has the key '{key}'{nearest(key, known)}")
    leaves = [key.rsplit(".", 1)[-1] for key in keys]
    names = leaves if len(set(leaves)) == len(leaves) else keys
    groups: dict[str, dict[str, Run]] = {}
    for label, run in zip(labels, found):
        name = ", ".join(f"{name}={_value(run, key)}" for name, key in zip(names, keys))
        groups.setdefault(name, {})[label] = run
    return [Group(name, each) for name, each in groups.items()]


def _first_and_more(labels: Sequence[str], members: Sequence[int]) -> str:
    more = len(members) - 1
    return labels[members[0]] + (f" and {more} more seed{'s' if more > 1 else ''}" if more else "")


def _value(run: Run, key: str) -> str:
    return repr(run.config[key]) if key in run.config else MISSING


def differing_keys(found: Iterable[Run]) -> list[str]:
    """Return the keys of the flat configs whose values are not the same in all runs."""
    found = list(found)
    every = dict.fromkeys(key for run in found for key in run.config)
    return [key for key in every if len({_value(run, key) for run in found}) > 1]


def keys_within(groups: Sequence[Group]) -> list[str]:
    """Return the keys of the config in which runs of one group differ."""
    return list(dict.fromkeys(key for group in groups for key in differing_keys(group.members.values())))


def lacking(groups: Sequence[Group], metric: str) -> list[str]:
    """Return the labels of the runs that ended without a metric, or with one that is not finite."""
    return [label for group in groups for label, run in group.members.items() if not _has(run, metric)]


def _has(run: Run, metric: str) -> bool:
    return metric in run.numbers and math.isfinite(run.numbers[metric])


def notes(groups: Sequence[Group], metrics: Sequence[str], keys: Sequence[str] | None) -> list[str]:
    """Return what the tables do not say: what a group's interval is over, and which runs lack a metric.

    Args:
      groups: the groups.
      metrics: the names that the tables show.
      keys: those that runs were grouped by; None: all but the seed.
    """
    mixed = [key for key in keys_within(groups) if key != "seed"] if keys is not None else []
    found = [f"Runs of one group differ in more than their seed: {', '.join(mixed)}"] if mixed else []
    for metric in metrics:
        if without := lacking(groups, metric):
            found.append(f"Without a finite {metric}: {', '.join(without)}")
    return found


def interval(group: Group, metric: str) -> Interval | None:
    """Return `mean_interval` of a group's runs; None where none has the metric."""
    values = group.values(metric)
    return mean_interval(values) if values else None


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of the runs' values, one or more, and Student's t interval, for which it takes two."""
    return _student(values, f"{len(values)} run{'s' if len(values) > 1 else ''}")


def difference(group: Group, reference: Group, metric: str, keys: Sequence[str]) -> Interval | None:
    """Return the mean of a group less that of another.

    Args:
      group: the one.
      reference: the other.
      metric: of runs that ended with it.
      keys: what differs within groups, the seed as a rule: runs that agree in it are a pair. What has no partner is
        left out of the paired interval.

    Returns:
      Student's interval over at least two pairs; else Welch's, or none, around the difference of the means. None where
      a group has no run with the metric.
    """
    ours, theirs = group.values(metric), reference.values(metric)
    if not ours or not theirs:
        return None
    pairs = _pairs(group, reference, metric, keys)
    if len(pairs) > 1:
        return _student([a - b for a, b in pairs], f"{len(pairs)} pairs")
    over = f"unpaired, {len(ours)} and {len(theirs)} runs"
    center = statistics.fmean(ours) - statistics.fmean(theirs)
    if len(ours) < 2 or len(theirs) < 2:
        return Interval(center, None, over)
    return Interval(center, _welch(ours, theirs), over)


def _pairs(group: Group, reference: Group, metric: str, keys: Sequence[str]) -> list[tuple[float, float]]:
    """Return the values of runs that agree in `keys`; none where two runs of one group cannot be told apart by them."""
    ours, theirs = _by_keys(group, metric, keys), _by_keys(reference, metric, keys)
    if ours is None or theirs is None:
        return []
    return [(value, theirs[place]) for place, value in ours.items() if place in theirs]


def _by_keys(group: Group, metric: str, keys: Sequence[str]) -> dict[Hashable, float] | None:
    found: dict[Hashable, float] = {}
    for run in group.members.values():
        if _has(run, metric):
            place = tuple(_value(run, key) for key in keys)
            if place in found:
                return None
            found[place] = run.numbers[metric]
    return found


def _student(values: Sequence[float], over: str) -> Interval:
    center, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(center, None, over)
    return Interval(center, _quantile(count - 1) * statistics.stdev(values) / math.sqrt(count), over)


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return half the width of the interval of a difference of means whose variances may differ (Welch 1947)."""
    parts = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    total = sum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (ours, theirs)))
    return _quantile(freedom) * math.sqrt(total)


def _quantile(degrees_of_freedom: float) -> float:
    """Return the factor of a standard error at `LEVEL`."""
    return float(scipy.stats.t.ppf(0.5 + LEVEL / 2, degrees_of_freedom))


def tables(groups: Sequence[Group], metrics: Sequence[str]) -> dict[str, Table]:
    """Return the tables that there are runs enough for: "config", "results", "intervals" and "differences"."""
    names = [group.name for group in groups]
    members = [run for group in groups for run in group.members.values()]
    found = {}
    if len(members) > 1:
        rows = [(key, *(group.show(key) for group in groups)) for key in differing_keys(members)]
        found["config"] = Table("Config: what differs", names, rows or [("nothing", *["" for _ in groups])])
    found["results"] = Table("Results", names, [(name, *(_show(group, name) for group in groups)) for name in metrics])
    if len(members) > len(groups):
        rows = [(name, *(show_interval(name, interval(group, name)) for group in groups)) for name in metrics]
        found["intervals"] = Table("Means and their 95 % intervals", names, rows)
    if len(members) > len(groups) > 1:
        first, keys = groups[0], keys_within(groups)
        rows = [
            (name, *(show_difference(name, difference(group, first, name, keys)) for group in groups[1:]))
            for name in metrics
        ]
        found["differences"] = Table(f"Differences to {first.name}, and their 95 % intervals", names[1:], rows)
    return found


def _show(group: Group, metric: str) -> str:
    """Return "mean ± sample deviation (runs)" of a metric; a dash where no run has it."""
    values, count = group.values(metric), len(group.members)
    if not values:
        return MISSING
    of = f" of {count}" if len(values) < count else ""
    return runs.show_mean(metric, values) + (f" ({len(values)}{of} runs)" if count > 1 else "")


def show_interval(metric: str, found: Interval | None) -> str:
    """Return "82.00 % (77.03 to 86.97)" of a mean; a dash where there is none."""
    return MISSING if found is None else _show_ends(found, lambda value: runs.show(metric, value), "")


def show_difference(metric: str, found: Interval | None) -> str:
    """Return "+8.00 points (+3.10 to +12.90; 3 pairs)" of a difference; a dash where there is none."""
    return MISSING if found is None else _show_ends(found, lambda value: show_amount(metric, value), found.over)


def _show_ends(found: Interval, show: Callable[[float], str], over: str) -> str:
    """Return an estimate with its unit, and in brackets the ends of its interval without it."""
    bare = [show(end).partition(" ")[0] for end in (found.low, found.high)]
    inside = [*([" to ".join(bare)] if found.half_width is not None else []), *([over] if over else [])]
    return show(found.center) + (f" ({'; '.join(inside)})" if inside else "")


def show_amount(metric: str, value: float) -> str:
    """Return a difference with its sign; of shares in percentage points, of bytes in GiB."""
    return f"{value / 2**30:+.2f} GiB" if metric.endswith("_bytes") else claims.amount(metric, value, "+")
