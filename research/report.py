"""Compares runs and generates the pages of recorded experiments.

  python -m research.report RUN [RUN ...]        the config keys that differ, the results, the curves
  python -m research.report --record RUN [RUN ...] --into experiments/NAME[/ARM]
                                                 copies the records of runs into an experiment
  python -m research.report --ledger             generates the experiments' pages, figures and tables

A RUN is the --workdir of a finished run. Runs that differ only in their seed are shown together, as mean ± sample
deviation. Exit status: 0 done; 2 a mistake of yours, in one line.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import rich.console
import rich.table
from rich.markup import escape

from research import storage
from research.errors import UserError, nearest
from research.reporting import figures, ledger, runs
from research.reporting.runs import Run

# The options of each use.
OPTIONS = {"compare": ("figure", "metrics"), "record": ("into",), "ledger": ("root",)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        return _dispatch(_parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m research.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", type=storage.path, help="the folder of a finished run")
    use = parser.add_mutually_exclusive_group()
    use.add_argument(
        "--record", dest="use", action="store_const", const="record", help="copy records into an experiment"
    )
    use.add_argument(
        "--ledger", dest="use", action="store_const", const="ledger", help="generate the pages of experiments"
    )
    parser.add_argument("--figure", type=storage.path, help="comparing: the PNG to write (default: comparison.png)")
    parser.add_argument("--metrics", help="comparing: only the metrics that match this regular expression")
    parser.add_argument("--into", type=pathlib.Path, help="recording: experiments/NAME, or an arm of it")
    parser.add_argument("--root", type=pathlib.Path, help="the folder of the experiments (default: experiments)")
    return parser.parse_args(argv)


def _dispatch(arguments: argparse.Namespace) -> int:
    use = arguments.use or "compare"
    for name in [name for names in OPTIONS.values() for name in names if name not in OPTIONS[use]]:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} cannot be combined with {'comparing runs' if use == 'compare' else f'--{use}'}")
    if bool(arguments.runs) == (use == "ledger"):
        raise UserError("name the folders of finished runs" if arguments.use != "ledger" else "--ledger takes no RUN")
    for path in filter(storage.is_remote, arguments.runs):
        storage.check_folder("RUN", path, writes=False)
    found = [runs.load(path) for path in arguments.runs]
    if use == "ledger":
        _print_ledger(ledger.write(arguments.root or pathlib.Path("experiments")))
    elif use == "record":
        if arguments.into is None:
            raise UserError("--record needs --into experiments/NAME")
        for target in ledger.record(found, arguments.into):
            print(f"recorded {target}")
    else:
        compare(found, arguments.metrics, arguments.figure or pathlib.Path("comparison.png"))
    return 0


def compare(found: Sequence[Run], pattern: str | None, figure: pathlib.Path) -> None:
    """Print the differences and results of runs and draw their curves.

    Args:
      found: the runs to compare.
      pattern: a regular expression that chooses metrics, in the table and in the figure; None: all in the table, a
        default set in the figure.
      figure: the PNG file to write.

    Raises:
      UserError: the pattern is invalid or matches nothing, or a run is given twice.
    """
    names = runs.labels(found)
    groups = {_group_name(members, names): members for members in runs.group_by_config(found)}
    rows = {name: run.rows for name, run in zip(names, found)}
    logged = figures.metric_names(rows)
    ended = list(dict.fromkeys(metric for run in found for metric in run.numbers))
    curves = None
    if pattern is not None:
        curves = _matching(pattern, logged)
        ended = _matching(pattern, ended)
        if not curves and not ended:
            raise UserError(f"--metrics: '{pattern}' matches no metric{nearest(pattern, logged)}")
    console = rich.console.Console()
    if len(found) > 1:
        console.print(_config_table(found, groups))
    console.print(_result_table(found, groups, ended))
    group_of = {names[i]: group for group, members in groups.items() for i in members}
    figures.curves(rows, curves, figure, groups=group_of)
    console.print(f"curves: {figure}", markup=False, highlight=False, soft_wrap=True)


def _group_name(members: Sequence[int], names: Sequence[str]) -> str:
    more = len(members) - 1
    return names[members[0]] + (f" and {more} more seed{'s' if more > 1 else ''}" if more else "")


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        return [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--metrics: '{pattern}' is not a regular expression ({error})") from None


def _config_table(found: Sequence[Run], groups: dict[str, list[int]]) -> rich.table.Table:
    """Return one row per config key whose values differ; the values of a group's seeds share a cell."""
    table = _table("Config: what differs", groups)
    for key in dict.fromkeys(key for run in found for key in run.config):
        values = [repr(run.config[key]) if key in run.config else "-" for run in found]
        if len(set(values)) > 1:
            cells = [", ".join(dict.fromkeys(values[i] for i in members)) for members in groups.values()]
            table.add_row(key, *map(escape, cells))
    if not table.row_count:
        table.add_row("nothing", *["" for _ in groups])
    return table


def _result_table(found: Sequence[Run], groups: dict[str, list[int]], metrics: Sequence[str]) -> rich.table.Table:
    table = _table("Results", groups)
    for metric in metrics:
        values = [[found[i].numbers[metric] for i in m if metric in found[i].numbers] for m in groups.values()]
        table.add_row(metric, *[_cell(metric, v, len(m)) for v, m in zip(values, groups.values())])
    return table


def _cell(metric: str, values: Sequence[float], runs_in_group: int) -> str:
    missing = f" ({len(values)} of {runs_in_group} runs)" if 0 < len(values) < runs_in_group else ""
    return runs.show_mean(metric, values) + missing if values else "-"


def _table(title: str, groups: dict[str, list[int]]) -> rich.table.Table:
    table = rich.table.Table("", title=title, title_justify="left")
    for name in groups:
        table.add_column(escape(name), justify="right", overflow="fold")
    return table


def _print_ledger(verdicts: dict[str, str]) -> None:
    table = rich.table.Table("experiment", "verdict", title="Ledger", title_justify="left")
    for name, verdict in verdicts.items():
        table.add_row(name, verdict)
    rich.console.Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
