"""The command line's mistakes, in one line each."""

import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from research.errors import UserError, nearest


def parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Parses the command line, overrides such as --config.optimizer.learning_rate=3e-5 included.

    Raises:
      UserError: a flag or a config key does not exist, or a value has the wrong type.
    """
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in argv):
        print(f"{sys.modules['__main__'].__doc__}\n{values.module_help(sys.modules['__main__'])}")
        sys.exit(0)
    _check_file(argv)
    try:
        rest = values(list(argv))
    except (AttributeError, KeyError, IndexError):
        raise UserError(_unknown_key(values, argv)) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).removeprefix("flag ").split())) from None
    if len(rest) > 1:
        raise UserError(f"'{rest[1]}' is no flag; flags begin with -- and hold no spaces around =")


def _check_file(argv: Sequence[str]) -> None:
    """Raises UserError if the config file is not there."""
    for argument, following in zip(argv, [*argv[1:], ""]):
        found = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if not found:
            continue
        path = pathlib.Path((found[1] if found[1] is not None else following).split(":")[0])
        if not path.is_file():
            folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
            raise UserError(f"--config: there is no file {path}{nearest(str(path), map(str, folder.glob('*.py')))}")


def _unknown_key(values: flags.FlagValues, argv: Sequence[str]) -> str:
    """Returns which override names a key that the config does not have, and the nearest that it has."""
    values.unparse_flags()
    values([argv[0], *(a for a in argv[1:] if re.match(r"--?config(=|$)", a))])
    for argument in argv[1:]:
        path = re.match(r"--?config\.([^=]+)", argument)
        node: Any = values.config
        for i, key in enumerate(re.findall(r"[^.\[\]]+", path[1]) if path else []):
            if isinstance(node, Sequence) and not isinstance(node, str) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, Mapping) or hasattr(node, "keys"):
                if key not in node:
                    return f"config.{path[1]}: there is no such key{nearest(key, node.keys())}"  # type: ignore[index]
                node = node[key]
            else:
                parts = path[1].split(".")[: i + 1]  # type: ignore[index]
                return f"config.{'.'.join(parts)}: there is no such key below a plain value"
    return "a config override names a key that does not exist"
