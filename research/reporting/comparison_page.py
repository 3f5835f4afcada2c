"""A comparison of runs as one page for a browser, with the pictures in it."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research import storage
from research.reporting import comparison
from research.reporting.comparison import Group, Table
from research.reporting.page import Html, file_uri, join, page, scroll, tag
from research.reporting.runs import Run

PNG = b"\x89PNG\r\n\x1a\n"
STRIP = (160, 18)  # the width and height of a drawn interval, in pixels
# Pictures have a white ground of their own, also where the page is dark.
STYLE = """
table.words td,table.words th{text-align:left}table.words td{white-space:normal;min-width:8rem}
table.words td:last-child{min-width:16rem}
svg{display:block;margin:.3rem 0 0 auto;color:var(--link)}
.curves,.pictures figure{background:#fff;border:1px solid var(--line);border-radius:6px;padding:.75rem}
.curves{overflow-x:auto}.curves img{min-width:min(44rem,200vw)}.curves img,.pictures img{border:0}
.pictures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr))}
.pictures figcaption{color:#565b64;margin-top:.5rem}
"""


def render(groups: Sequence[Group], metrics: Sequence[str], curves: bytes, keys: Sequence[str] | None = None) -> str:
    """Return the page.

    Args:
      groups: the runs, as `comparison.make_groups` divides them; of the pictures in their folders `figures` the last of
        each name is shown.
      metrics: the metrics that tables show.
      curves: a PNG file's content.
      keys: those that runs were grouped by.
    """
    tables = comparison.tables(groups, metrics)
    strips = {(metric, i): _strip(groups, metric, i) for metric in metrics for i in range(len(groups))}
    curve = tag("img", src=file_uri("png", curves), alt="Curves of the metrics over the steps of training")
    parts = [
        _table(tables["results"]),
        _table(tables["intervals"], drawings=strips) if "intervals" in tables else None,
        _table(tables["differences"]) if "differences" in tables else None,
        tag("h2", "Curves"),
        tag("figure", curve, class_="curves"),
        _table(tables["config"], "words") if "config" in tables else None,
        _table(_runs(groups), "words"),
        _pictures(groups),
    ]
    count = sum(len(group.members) for group in groups)
    title = f"{_count(count, 'run')} in {_count(len(groups), 'group')}" if len(groups) < count else _count(count, "run")
    lines = ["; ".join(group.name for group in groups), *comparison.notes(groups, metrics, keys)]
    return page(title, *(tag("p", line, class_="quiet") for line in lines), *parts, style=STYLE)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(
    table: Table, kind: str | None = None, drawings: Mapping[tuple[str, int], Html | None] | None = None
) -> Html:
    """Return a table in a box of its own that scrolls; a drawing stands beneath the text of its row and column."""
    head = tag("tr", tag("th", scope="col"), *(tag("th", name, scope="col") for name in table.columns))
    lines = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", cell, (drawings or {}).get((name, i))) for i, cell in enumerate(cells)),
        )
        for name, *cells in table.rows
    ]
    made = tag("table", tag("thead", head), tag("tbody", *lines), class_=kind)
    return join([tag("h2", table.title), scroll(table.title, made)])


def _strip(groups: Sequence[Group], metric: str, column: int) -> Html | None:
    """Return an interval as a drawing: a dot for each run, a bar; all of a metric's groups on one scale."""
    every = [(group.values(metric), comparison.interval(group, metric)) for group in groups]
    ends = [x for values, found in every for x in (*values, *_ends(found))]
    values, found = every[column]
    if found is None or min(ends) == max(ends):
        return None
    width, height = STRIP
    scale = (width - 8) / (max(ends) - min(ends))

    def place(x: float) -> str:
        return f"{4 + (x - min(ends)) * scale:.1f}"

    middle, line = height // 2, {"stroke": "currentColor", "stroke_width": 2}
    low, high = map(place, _ends(found))
    bar = tag("path", d=f"M{low} {middle}H{high}", **line) if low != high else None
    dots = [tag("circle", cx=place(x), cy=middle, r=3, fill="currentColor", opacity=0.45) for x in values]
    tick = tag("path", d=f"M{place(found.center)} 3V{height - 3}", **line)
    return tag("svg", bar, *dots, tick, width=width, height=height, aria_hidden="true")


def _ends(found: comparison.Interval | None) -> list[float]:
    if found is None:
        return []
    return [found.center, found.center] if found.half_width is None else [found.low, found.high]


def _runs(groups: Sequence[Group]) -> Table:
    """Return what each run was: where it is, and what made it."""
    rows = []
    for group in groups:
        for label, run in group.members.items():
            git = run.run.get("git") or {}
            commit = f"{str(git.get('commit', ''))[:12]}{' and changes' if git.get('dirty') else ''}"
            command = str(run.run.get("command", ""))
            rows.append((label, group.name, str(run.config.get("seed", "")), str(run.path), commit, command))
    return Table("Runs", ("group", "seed", "folder", "commit", "command"), rows)


def _pictures(groups: Sequence[Group]) -> Html | None:
    """Return the pictures of all runs, or None where they have none."""
    sections: list[Any] = []
    for group in groups:
        for label, run in group.members.items():
            if found := [_figure(label, caption, content) for caption, content in pictures(run)]:
                sections += [tag("h3", label), tag("div", *found, class_="pictures")]
    return join([tag("h2", "Pictures"), *sections]) if sections else None


def _figure(label: str, caption: str, content: bytes) -> Html:
    image = tag("img", src=file_uri("png", content), alt=f"{label}: {caption}")
    return tag("figure", image, tag("figcaption", caption))


def pictures(run: Run) -> list[tuple[str, bytes]]:
    """Return captions and contents of the PNG files in a run's folder `figures`, of each name that of the last step.

    A file's name is NAME-STEP.png, or NAME.png; what only is called so is left out.
    """
    folder = run.path / "figures"
    by_name: dict[str, list[tuple[int, str]]] = {}
    for file in _files(folder):
        if found := re.fullmatch(r"(.+?)(?:-(\d+))?\.png", file, re.DOTALL):
            by_name.setdefault(found[1], []).append((int(found[2] or -1), file))
    made = []
    for name, steps in sorted(by_name.items()):
        step, file = max(steps)
        content = (folder / file).read_bytes()
        if content.startswith(PNG):
            of = f", the last of {len(steps)}" if len(steps) > 1 else ""
            made.append((f"{name}, step {step}{of}" if step >= 0 else name, content))
    return made


def _files(folder: pathlib.Path) -> list[str]:
    """Return the files in a folder, at any depth, relative to it."""
    if storage.is_remote(folder):
        return storage.find(folder)
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
