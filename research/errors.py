"""The user's own mistakes: one line that names what is wrong and the nearest right name."""

import difflib
import pathlib
from collections.abc import Iterable

NEAR = 0.5  # the least share of common characters at which one name is a likely misspelling of another
SHOWN = 12


class UserError(Exception):
    """A mistake that the user can correct. `main` prints its one line and exits with status 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the option that `name` may be a misspelling of, else the options there are.

    Flags are compared without their dashes, and files by their names: what all options share tells nothing.
    """
    options = sorted({str(option) for option in options})
    bare = {_bare(option): option for option in reversed(options)}
    close = difflib.get_close_matches(_bare(str(name)), bare, n=1, cutoff=NEAR)
    if close:
        return f"; did you mean '{bare[close[0]]}'?"
    if not options:
        return ""
    shown = ", ".join(options[:SHOWN]) + (", ..." if len(options) > SHOWN else "")
    return f"; there are: {shown}"


def _bare(name: str) -> str:
    if name.endswith(".py"):
        return pathlib.PurePath(name).stem
    return name.removeprefix("--")
