"""The command line: a config file, what it overrides, and its mistakes in one line each."""

import ast
import importlib.util
import inspect
import json
import pathlib
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference

from research.configuration.sweeps import Sweep
from research.errors import UserError, nearest

T = TypeVar("T")
Override = tuple[str, str]  # its key below the config, "optimizer.learning_rate", and its value as it was typed


def split(argv: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Split a command line into overrides (--config.KEY=VALUE) and the rest.

    Raises:
      UserError: an override has no value, or another one follows that undoes it.
    """
    overrides: list[Override] = []
    rest = []
    for argument in argv:
        found = re.match(r"--config\.([^=]*)(=)?(.*)", argument, re.DOTALL)
        if not found:
            rest.append(argument)
            continue
        if not found[2]:
            raise UserError(f"{argument}: it has no value; write {argument}=VALUE")
        for earlier, _ in overrides:
            if earlier == found[1] or earlier.startswith((f"{found[1]}.", f"{found[1]}[")):
                raise UserError(f"config.{earlier}: it is overridden by the later --config.{found[1]}; leave one out")
        overrides.append((found[1], found[3]))
    return overrides, rest


def load(argument: str) -> ConfigDict:
    """Return what `get_config` in a file gives; `argument` is its path and, after a colon, the variant.

    Raises:
      UserError: there is no such file or variant, or its Python is wrong.
    """
    return _call(argument, "get_config", ConfigDict, variant=True)


def load_sweep(argument: str) -> Sweep:
    """Return what `get_sweep` in a config file gives.

    Raises:
      UserError: the file defines none, or as `load`.
    """
    return _call(argument, "get_sweep", Sweep, variant=False)


def _call(argument: str, function: str, kind: type[T], variant: bool) -> T:
    """Return what a function of a config file returns."""
    name, _, chosen = argument.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
        raise UserError(f"--config: there is no file {path}{nearest(name, map(str, folder.glob('*.py')))}")
    try:
        spec = importlib.util.spec_from_file_location("config", path)
        if spec is None or spec.loader is None:
            raise UserError(f"--config: {path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if function == "get_sweep" and not hasattr(module, function):
            raise UserError(f"--config: {path} defines no get_sweep(); see research/configuration/sweeps.py")
        made = getattr(module, function)(*[chosen] if chosen and variant else [])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config: {_where(error, path)}: {_one_line(error)}") from error
    if not isinstance(made, kind):
        raise UserError(f"--config: {function} in {path} returns a {type(made).__name__}, not a {kind.__name__}")
    return made


def apply(config: ConfigDict, overrides: Sequence[Override]) -> None:
    """Override values of a config.

    A value is read as what it replaces: text as it is, numbers, true and false as JSON, sequences as JSON or parted by
    commas, sections as JSON. What replaces null, or is new, may be any of these. A key is new where the callable that
    its section configures has a parameter of that name.

    Raises:
      UserError: a key that does not exist, with the nearest that does, or a value of the wrong type.
    """
    for key, text in overrides:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+|\[\d+\])*", key):
            raise UserError(f"--config.{key}: keys are written like config.data.ops[0].max_length")
        *parents, last = [int(p[1:]) if p[0] == "[" else p for p in re.findall(r"[\w-]+|\[\d+", key)]
        node: Any = config
        name = "config"
        for part in parents:
            node, name = _child(node, part, name), _join(name, part)
        _set(node, last, text, name)


def _join(name: str, part: str | int) -> str:
    return f"{name}[{part}]" if isinstance(part, int) else f"{name}.{part}"


def _child(node: Any, part: str | int, name: str) -> Any:
    """Return the node below `node`, which is called `name`."""
    if isinstance(part, int):
        if not isinstance(node, list | tuple):
            raise UserError(f"{name}: it is no sequence, so there is no {name}[{part}]")
        if part >= len(node):
            raise UserError(f"{name}[{part}]: the sequence has {len(node)} items, counted from 0")
    elif not isinstance(node, ConfigDict | dict):
        raise UserError(f"{name}.{part}: there is no such key below a plain value")
    elif part not in node and not _begun(node, part, name):
        known = [*node, *_parameters(node, name)]
        raise UserError(f"{name}.{part}: there is no such key{nearest(part, known)}")
    return _value(node[part])


def _begun(node: ConfigDict | dict, part: str, name: str) -> bool:
    """Begin a section that the config left out, all of whose keys have their defaults, if it is one."""
    from research.experiment import SECTIONS

    if not isinstance(node, ConfigDict) or name != "config" or part not in (*SECTIONS, "plan"):
        return False
    with node.unlocked():
        node[part] = ConfigDict()
    return True


def _set(node: Any, part: str | int, text: str, name: str) -> None:
    """Set one value, everywhere if it is a reference that other keys follow."""
    path = _join(name, part)
    new = isinstance(node, ConfigDict | dict) and part not in node and part in (known := _parameters(node, name))
    old = known[str(part)] if new else _child(node, part, name)
    kind = type(old)
    if new and not isinstance(old, str | tuple):
        kind = type(None)  # numbers may be of another type than the default; building tells
    elif isinstance(node, ConfigDict) and not new:
        kind = node.get_type(part)  # placeholders have one before they have a value
    value = _parse(text, kind, old, path)
    if isinstance(node, tuple):
        raise UserError(f"{path}: override the whole sequence, {name}")
    fields = dict(node.items(preserve_field_references=True)) if isinstance(node, ConfigDict) else node
    if not new and isinstance(fields[part], FieldReference):
        fields[part].set(value, type_safe=False)
        return
    if not isinstance(node, ConfigDict):
        node[part] = value
        return
    with node.unlocked(), node.ignore_type():
        node[part] = value


def _value(field: Any) -> Any:
    return field.get() if isinstance(field, FieldReference) else field


def _parameters(node: Mapping[str, Any] | ConfigDict, name: str) -> dict[str, Any]:
    """Return the parameters of what a section configures, and their defaults."""
    from research.build import locate  # here, as it takes seconds that a mistyped command line should not
    from research.experiment import KEYS, PLAN_KEYS, SECTIONS

    plain = {"config": KEYS, "config.plan": PLAN_KEYS}
    if name in plain:
        return dict.fromkeys(plain[name])
    call = node.get("call") or SECTIONS.get(name.removeprefix("config."))
    if not call:
        return {}
    parameters = inspect.signature(locate(call, name)).parameters
    return {"call": call} | {key: parameter.default for key, parameter in parameters.items()}


def _parse(text: str, kind: type, old: Any, path: str) -> Any:
    """Return the value that `text` stands for where one of type `kind` stood."""
    if kind is str:
        return text
    if issubclass(kind, list | tuple):
        if not text.lstrip().startswith(("[", "(")):
            items = [item.strip() for item in text.split(",")] if text.strip() else []
            return kind(items if old and all(isinstance(x, str) for x in old) else map(_literal, items))
        value = _literal(text)
        if not isinstance(value, list | tuple):
            raise UserError(f'{path}: \'{text}\' is not a sequence; write it like [1, 2] or ["a", "b"]')
        return kind(value)
    value = _literal(text)
    if value is None or kind is type(None):
        return ConfigDict(value) if isinstance(value, dict) else value
    if issubclass(kind, dict | ConfigDict):
        if not isinstance(value, dict):
            raise UserError(f"{path}: it is a section, not '{text}'; override its keys{_some_keys(old, path)}")
        return ConfigDict(value)
    wanted = {bool: (bool,), int: (int,), float: (int, float)}.get(kind, (kind,))
    if type(value) not in wanted:
        article = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, f"a {kind.__name__}")
        raise UserError(f"{path}: '{text}' is not {article}")
    return value


def _literal(text: str) -> Any:
    """Read JSON, or else Python's literals, or else leave text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        named = {"True": True, "False": False, "None": None}
        return named[text] if text in named else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _some_keys(section: Any, path: str) -> str:
    return f", such as --{path}.{next(iter(section))}" if section else ""


def _where(error: Exception, path: pathlib.Path) -> str:
    """Return file:line, the last line of the config file that an error passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}:{lines[-1]}" if lines else str(path)


def _one_line(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
