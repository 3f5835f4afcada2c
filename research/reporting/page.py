"""A comparison of runs as one HTML page that needs no other file and no network: pictures are part of it.

All that comes from runs, such as their names and configs, is escaped; and the page's own policy forbids scripts, and
whatever is not part of it.
"""

import base64
import html
import pathlib
import re
from collections.abc import Mapping, Sequence

from research import storage
from research.reporting import comparison
from research.reporting.comparison import Group, Table
from research.reporting.runs import Run

PNG = b"\x89PNG\r\n\x1a\n"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STRIP = (160, 18)  # the width and height of a drawn interval, in pixels
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --page: #fff; --box: #f6f8fa;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --page: #0d1117; --box: #161b22; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0; color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; overflow-wrap: normal; }
th:first-child { text-align: left; }
thead th { background: var(--box); }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
.text td, .text th { text-align: left; }
.text td { white-space: normal; min-width: 8rem; }
.text td:last-child { min-width: 16rem; }
svg { display: block; margin: .3rem 0 0 auto; color: var(--mark); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.curves { overflow-x: auto; }
.curves img { min-width: min(44rem, 200vw); }
.curves, .pictures figure { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .75rem; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
figcaption { margin-top: .5rem; font-size: .85rem; color: #59636e; }
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
    parts = [_table("results", tables["results"])]
    if "intervals" in tables:
        parts.append(_table("intervals", tables["intervals"], strips))
    if "differences" in tables:
        parts.append(_table("differences", tables["differences"]))
    drawn = f'<figure class="curves">{_image(curves, "Curves of the metrics over the steps of training")}</figure>'
    parts.append(f"<h2>Curves</h2>\n{drawn}")
    if "config" in tables:
        parts.append(_table("text", tables["config"]))
    parts += [_table("text", _runs(groups)), _pictures(groups)]
    count = sum(len(group.members) for group in groups)
    title = f"{_count(count, 'run')} in {_count(len(groups), 'group')}" if len(groups) < count else _count(count, "run")
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in comparison.notes(groups, metrics, keys))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{html.escape("; ".join(group.name for group in groups))}</p>
{notes}{"".join(part + chr(10) for part in parts if part)}</main>
</body>
</html>
"""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(kind: str, table: Table, drawings: Mapping[tuple[str, int], str] | None = None) -> str:
    """Return a table in a box of its own that scrolls; a drawing stands beneath the text of its row and column."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    lines = []
    for name, *cells in table.rows:
        drawn = [(drawings or {}).get((name, i), "") for i in range(len(cells))]
        inside = "".join(f"<td>{html.escape(cell)}{drawing}</td>" for cell, drawing in zip(cells, drawn))
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{inside}</tr>\n')
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="scroll" tabindex="0"><table class="{kind}">\n'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody></table></div>'
    )


def _strip(groups: Sequence[Group], metric: str, column: int) -> str:
    """Return an interval as a drawing: a dot for each run, a bar; all of a metric's groups on one scale."""
    every = [(group.values(metric), comparison.interval(group, metric)) for group in groups]
    ends = [x for values, found in every for x in (*values, *_ends(found))]
    values, found = every[column]
    if found is None or min(ends) == max(ends):
        return ""
    width, height = STRIP
    scale = (width - 8) / (max(ends) - min(ends))

    def place(x: float) -> str:
        return f"{4 + (x - min(ends)) * scale:.1f}"

    middle = height // 2
    low, high = map(place, _ends(found))
    bar = f'<path d="M{low} {middle}H{high}" stroke="currentColor" stroke-width="2"/>' if low != high else ""
    dots = "".join(f'<circle cx="{place(x)}" cy="{middle}" r="3" fill="currentColor" opacity=".45"/>' for x in values)
    tick = f'<path d="M{place(found.center)} 3V{height - 3}" stroke="currentColor" stroke-width="2"/>'
    return f'<svg width="{width}" height="{height}" aria-hidden="true">{bar}{dots}{tick}</svg>'


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


def _pictures(groups: Sequence[Group]) -> str:
    """Return the pictures of all runs, or nothing where they have none."""
    sections = []
    for group in groups:
        for label, run in group.members.items():
            if found := [_figure(label, caption, content) for caption, content in pictures(run)]:
                sections.append(f'<h3>{html.escape(label)}</h3>\n<div class="pictures">{"".join(found)}</div>')
    return "\n".join(["<h2>Pictures</h2>", *sections]) if sections else ""


def _figure(label: str, caption: str, content: bytes) -> str:
    image = _image(content, f"{label}: {caption}")
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def _image(content: bytes, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'


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
