"""Compares runs and generates the pages of recorded experiments.

  python -m research.report RUN [RUN ...]        the config keys that differ, the results, the curves
      --group=KEY[,KEY ...]                      groups: the runs that agree in these keys of their configs
      --html=FILE                                all of it, and the runs' own pictures, as one page that needs no other
  python -m research.report --record RUN [RUN ...] --into experiments/NAME[/ARM]
                                                 copies the records of runs into an experiment
  python -m research.report --ledger             generates the experiments' pages, figures and tables

A RUN is the --workdir of a finished run. Runs that differ only in their seed, or that agree in the keys of --group, are
shown together: as mean ± sample deviation, with Student's 95 % interval of the mean, and as one curve in a band. Groups
are compared with that of the first RUN, over pairs of the same seed.

Exit status: 0 done; 2 a mistake of yours, in one line.
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
from research.reporting import comparison, comparison_page, figures, ledger, runs
from research.reporting.runs import Run

# The options of each use.
OPTIONS = {"compare": ("figure", "metrics", "group", "html"), "record": ("into",), "ledger": ("root",)}


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
    parser.add_argument("--group", help="comparing: keys of the config, separated by commas, by which runs are grouped")
    parser.add_argument("--html", type=storage.path, help="comparing: the page to write, one self-contained file")
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
        keys = None if arguments.group is None else _keys(arguments.group)
        if arguments.html is not None and arguments.html.is_dir():
            raise UserError(f"--html: {arguments.html} is a folder; name a file")
        compare(found, arguments.metrics, arguments.figure or pathlib.Path("comparison.png"), keys, arguments.html)
    return 0


def _keys(text: str) -> list[str]:
    """Return the keys that --group names, each once."""
    keys = list(dict.fromkeys(key.strip().removeprefix("config.") for key in text.split(",") if key.strip()))
    if not keys:
        raise UserError("--group: name keys of the config, such as --group=optimizer.learning_rate")
    return keys


def compare(
    found: Sequence[Run],
    pattern: str | None,
    figure: pathlib.Path,
    keys: Sequence[str] | None = None,
    html: pathlib.Path | None = None,
) -> None:
    """Print the differences and results of runs and draw their curves; write all of it as a page too.

    Args:
      found: the runs to compare.
      pattern: a regular expression that chooses metrics, in the table and in the figure; None: all in the table, a
        default set in the figure.
      figure: the PNG file to write.
      keys: of the config, by which runs are grouped: see `comparison.make_groups`.
      html: the file of the page, if there is to be one.

    Raises:
      UserError: the pattern is invalid or matches nothing, a run is given twice, or no config has one of the keys.
    """
    groups = comparison.make_groups(found, keys)
    rows = {label: run.rows for group in groups for label, run in group.members.items()}
    logged = figures.metric_names(rows)
    ended = list(dict.fromkeys(metric for run in found for metric in run.numbers))
    curves = None
    if pattern is not None:
        curves = _matching(pattern, logged)
        ended = _matching(pattern, ended)
        if not curves and not ended:
            raise UserError(f"--metrics: '{pattern}' matches no metric{nearest(pattern, [*logged, *ended])}")
    console = rich.console.Console()
    for table in comparison.tables(groups, ended).values():
        _print(console, table)
    for note in comparison.notes(groups, ended, keys):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    group_of = {label: group.name for group in groups for label in group.members}
    figures.curves(rows, curves, figure, groups=group_of, bands=True)
    console.print(f"curves: {figure}", markup=False, highlight=False, soft_wrap=True)
    if html is not None:
        content = comparison_page.render(groups, ended, figure.read_bytes(), keys).encode()
        storage.write(html, content)
        console.print(f"page: {html} ({len(content) / 2**20:.1f} MiB)", markup=False, highlight=False, soft_wrap=True)


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        return [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--metrics: '{pattern}' is not a regular expression ({error})") from None


def _print(console: rich.console.Console, table: comparison.Table) -> None:
    shown = rich.table.Table("", title=escape(table.title), title_justify="left")
    for name in table.columns:
        shown.add_column(escape(name), justify="right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def _print_ledger(verdicts: dict[str, str]) -> None:
    table = rich.table.Table("experiment", "verdict", title="Ledger", title_justify="left")
    for name, verdict in verdicts.items():
        table.add_row(name, verdict)
    rich.console.Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
