"""Claims of experiments: parsing claim.toml, and judging a claim by its runs."""

import dataclasses
import operator
import pathlib
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import typeguard

from research.errors import UserError, nearest
from research.reporting import runs
from research.reporting.runs import Run

PUBLISHED = "published"
COMPARISONS = {"at_least": operator.ge, "at_most": operator.le}

Arms = Mapping[str, Sequence[Run]]


@dataclasses.dataclass(frozen=True)
class Published:
    """A number reported elsewhere, or another fixed bar to compare with.

    Attributes:
      value: in the metric's unit; an accuracy of 86 % is 0.86.
      what: where it comes from: the table, the seeds.
      checked: whether it was verified at its source.
      name: what generated sentences call it.
    """

    value: float
    what: str
    checked: bool
    name: str = "the published number"


@dataclasses.dataclass(frozen=True)
class Rule:
    """The condition under which a claim holds, on means over the runs of an arm.

    Attributes:
      kind: at_least: arm >= against - tolerance; at_most: arm <= against + tolerance; within: they differ by at most
        the tolerance; ratio: the median of arm / against, over the runs of the same name, is >= minimum.
      arm: the name of an arm.
      against: the name of another arm, or "published".
      why: the reason for these numbers, and the difference they can resolve.
      tolerance: in the metric's unit.
      minimum: the least ratio.
    """

    kind: Literal["at_least", "at_most", "within", "ratio"]
    arm: str
    against: str
    why: str
    tolerance: float | None = None
    minimum: float | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """The contents of claim.toml.

    Attributes:
      title: the title of the page.
      claim: one sentence, with the number.
      source: a paper and its table, or how the bar was set.
      metric: a final metric or another number in result.json.
      arms: {folder below runs/: display name}.
      rule: the condition under which the claim holds.
      runs_per_arm: the runs that each arm needs; with fewer the verdict is "not run".
      hardware: the hardware of the runs.
      commands: the commands that reproduce the runs.
      reduced: how the original was scaled down; empty if it was not.
      published: the number reported at the source, if any.
      notes: further remarks.
      also: other numbers to show in the table.
      curves: metrics to plot over steps; if empty, there is no such figure.
      headline: whether the row also stands in README.md.
    """

    title: str
    claim: str
    source: str
    metric: str
    arms: dict[str, str]
    rule: Rule
    runs_per_arm: int
    hardware: str
    commands: str
    reduced: str
    published: Published | None = None
    notes: str = ""
    also: list[str] = dataclasses.field(default_factory=list)
    curves: list[str] = dataclasses.field(default_factory=list)
    headline: bool = False


def read_claim(path: pathlib.Path) -> Claim:
    """Read and check a claim.toml.

    Raises:
      UserError: the file is missing or not TOML, or a key is missing, unknown or of the wrong type.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid TOML ({error})") from None
    for name, kind in (("rule", Rule), ("published", Published)):
        if isinstance(table.get(name), dict):
            table[name] = _construct(kind, table[name], path, f"{name}.")
    claim = _construct(Claim, table, path, "")
    rule = claim.rule
    for key, arm, allowed in (
        ("arm", rule.arm, [*claim.arms]),
        ("against", rule.against, [*claim.arms] + [PUBLISHED] * (claim.published is not None)),
    ):
        if arm not in allowed:
            raise UserError(f"{path}: rule.{key}: there is no arm '{arm}'{nearest(arm, allowed)}")
    needed, other = ("minimum", "tolerance") if rule.kind == "ratio" else ("tolerance", "minimum")
    if getattr(rule, needed) is None or getattr(rule, other) is not None:
        raise UserError(f"{path}: a rule of kind '{rule.kind}' needs '{needed}' and must not have '{other}'")
    return claim


def _construct(kind: Any, table: dict[str, Any], path: pathlib.Path, prefix: str) -> Any:
    """Build a dataclass from a TOML table and check the name and type of every key."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            raise UserError(f"{path}: unknown key '{prefix}{key}'{nearest(key, fields)}")
        try:
            typeguard.check_type(value, fields[key].type)
        except typeguard.TypeCheckError as error:
            raise UserError(f"{path}: {prefix}{key}: {' '.join(str(error).split())}") from None
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in table:
            raise UserError(f"{path}: '{prefix}{key}' is missing")
    return kind(**table)


def judge(claim: Claim, arms: Arms) -> tuple[str, str]:
    """Return the verdict and the reason for it."""
    for arm, found in arms.items():
        if len(found) < claim.runs_per_arm:
            return "not run", f"{claim.arms[arm]}: {len(found)} of {claim.runs_per_arm} runs are recorded"
    holds, reason = _ratio(claim, arms) if claim.rule.kind == "ratio" else _difference(claim, arms)
    if not holds:
        return "not reproduced", reason
    return "reproduced at reduced scale" if claim.reduced else "reproduced", reason


def _ratio(claim: Claim, arms: Arms) -> tuple[bool, str]:
    """Judge the ratio of two arms, paired by run name, or of an arm to the published number."""
    rule = claim.rule
    above = {run.path.name: run.number(claim.metric) for run in arms[rule.arm]}
    if rule.against == PUBLISHED and claim.published:
        below = dict.fromkeys(above, claim.published.value)
    else:
        below = {run.path.name: run.number(claim.metric) for run in arms[rule.against]}
    if set(above) != set(below):
        unpaired = ", ".join(sorted(set(above) ^ set(below)))
        raise UserError(f"a ratio needs runs of the same names in {rule.arm} and {rule.against}; unpaired: {unpaired}")
    ratios = [above[name] / below[name] for name in above]
    ratio = statistics.median(ratios)
    holds = ratio >= (rule.minimum or 0)
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    of = f"{claim.arms[rule.arm]} / {opponent(claim)}"
    return holds, f"{of}: {ratio:.2f}{spread}, {'at least' if holds else 'below'} {rule.minimum:g}"


def _difference(claim: Claim, arms: Arms) -> tuple[bool, str]:
    """Judge the difference of two arms' means, or of an arm's mean and the published number."""
    rule, metric = claim.rule, claim.metric
    ours = mean(arms[rule.arm], metric)
    against = claim.published.value if claim.published and rule.against == PUBLISHED else None
    if against is None:
        against = mean(arms[rule.against], metric)
    tolerance = rule.tolerance or 0.0
    if rule.kind == "within":
        holds = abs(ours - against) <= tolerance
        allowed = "either way"
    else:
        limit = against - tolerance if rule.kind == "at_least" else against + tolerance
        holds = COMPARISONS[rule.kind](ours, limit)
        allowed = "below" if rule.kind == "at_least" else "above"
    return holds, (
        f"{claim.arms[rule.arm]} {runs.show(metric, ours)}, {opponent(claim)} {runs.show(metric, against)}: "
        f"a difference of {amount(metric, ours - against, '+')}; allowed: {amount(metric, tolerance)} {allowed}"
    )


def mean(found: Sequence[Run], metric: str) -> float:
    """Return the mean of a metric over runs."""
    return statistics.fmean(run.number(metric) for run in found)


def amount(metric: str, difference: float, sign: str = "") -> str:
    """Format a difference; shares in percentage points. With `sign` "+" it is always signed."""
    return f"{100 * difference:{sign}.2f} points" if runs.is_share(metric) else f"{difference:{sign}.4g}"


def opponent(claim: Claim) -> str:
    """Return the name of what the claim compares with: an arm, or a published number."""
    if claim.rule.against == PUBLISHED and claim.published:
        return claim.published.name
    return claim.arms[claim.rule.against]
