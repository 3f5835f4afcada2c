"""A config node becomes an object: `call` says what to call, the other keys are its keyword arguments."""

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any

import typeguard
from ml_collections import ConfigDict

from research.configuration.moved import current
from research.errors import UserError, nearest


def build(node: Any, name: str, /, **context: Any) -> Any:
    """Build a config node and all nodes in it.

    Args:
      node: a mapping with `call` is built by calling that; other mappings become dicts and sequences tuples.
      name: of the node, for messages: "config.task.model".
      **context: objects passed to every callable that asks for them by parameter name and is not given them.
    """
    if isinstance(node, Mapping | ConfigDict):
        arguments = {key: build(node[key], f"{name}.{key}", **context) for key in node if key != "call"}
        return invoke(locate(node["call"], name), arguments, name, **context) if "call" in node else arguments
    if isinstance(node, list | tuple):
        return tuple(build(value, f"{name}[{i}]", **context) for i, value in enumerate(node))
    return node


def invoke(target: Callable[..., Any], arguments: Mapping[str, Any], name: str, /, **context: Any) -> Any:
    """Call `target`; an unknown, missing or mistyped argument is a UserError that says which."""
    every = {k: p for k, p in inspect.signature(target).parameters.items() if k not in ("parent", "name")}
    parameters = {k: p for k, p in every.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in every.values())  # and checks their names itself
    arguments = {k: context[k] for k in parameters if k in context} | dict(arguments)
    called = getattr(target, "__qualname__", str(target))
    for key in arguments:
        if key not in parameters and not takes_any:
            raise UserError(f"{name}.{key}: {called} takes no '{key}'{nearest(key, parameters)}")
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for key, parameter in parameters.items():
        unset = key in arguments and arguments[key] is None and not _fits(None, hints.get(key, Any))
        if parameter.default is parameter.empty and (key not in arguments or unset):
            raise UserError(f"{name}.{key}: {called} needs it")
    for key, value in arguments.items():
        if not _fits(value, hints.get(key, Any)):
            wanted = str(parameters[key].annotation).removeprefix("<class '").removesuffix("'>")
            raise UserError(f"{name}.{key}: {value!r} is a {type(value).__name__}, not {wanted}")
    try:
        return target(**arguments)
    except UserError as error:
        raise UserError(_placed(str(error), name, arguments)) from error


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the annotated type; an int is a float too, but a bool is neither."""
    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    kinds = [hint]
    for kind in kinds:
        kinds.extend(typing.get_args(kind))
    bools = type(value) is bool or (type(value) is tuple and any(type(item) is bool for item in value))
    numbers = any(kind in (int, float) for kind in kinds) and bool not in kinds
    return not (bools and numbers)


def _placed(message: str, name: str, arguments: Mapping[str, Any]) -> str:
    """Put the name of the node before what an object has to say about its arguments."""
    if message.startswith(("config.", "--")):
        return message
    return f"{name}.{message}" if message.partition(":")[0] in arguments else f"{name}: {message}"


def locate(path: str, name: str) -> Callable[..., Any]:
    """Return the object at a dotted path such as "research.models.bert.Encoder"."""
    module, _, attribute = str(path).rpartition(".")
    if not module:
        raise UserError(f"{name}.call: '{path}' is not of the form package.module.name")
    if current(path) != path:
        raise UserError(f"{name}.call: '{path}' is now '{current(path)}'")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{name}.call: '{path}' needs the package '{error.name}', which is not here") from None
        raise UserError(f"{name}.call: no module '{module}'{_nearest_module(error.name)}") from None
    if not hasattr(found, attribute):
        public = [k for k, v in vars(found).items() if getattr(v, "__module__", None) == module]
        raise UserError(f"{name}.call: no '{attribute}' in '{module}'{nearest(attribute, public)}")
    if not callable(getattr(found, attribute)):
        raise UserError(f"{name}.call: '{path}' cannot be called")
    return getattr(found, attribute)


def _nearest_module(missing: str) -> str:
    """Suggest a sibling of the first part of a dotted path that could not be imported."""
    package, _, _ = missing.rpartition(".")
    path = getattr(importlib.import_module(package), "__path__", []) if package else None
    siblings = [f"{package}.{m.name}".removeprefix(".") for m in pkgutil.iter_modules(path)]
    return nearest(missing, siblings if package else difflib.get_close_matches(missing, siblings))
