"""The user's own mistakes: one line, the name of what is wrong and the nearest right one."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend. `main` prints its one line and exits with status 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the option nearest to `name`, else the options there are."""
    options = sorted({str(option) for option in options})
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    if not options:
        return ""
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f"; there are: {shown}"
