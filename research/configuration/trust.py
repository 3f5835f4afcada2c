"""What a config that was read from a folder may name: a run's folder is data, and data must not run code.

`call` can name any Python callable, so building somebody else's config.json would run whatever it names. The config of
a folder is therefore checked when it is read, before anything is imported or built. It may name

- public classes defined at the top level of the modules in `PACKAGES`, which hold what configs are made of;
- public functions defined there whose annotated return type is in `MADE`: functions that return a part of a run, and
  not those that are called for their effect, such as writing files;
- the callables in `SECTIONS`;
- public functions of `OPTAX` that are annotated to return a gradient transformation or a schedule;
- what is in the modules that the user trusts: those of --trust, and those that the user's own config names.

Names that a module imports are not defined in it. What the user wrote (a config file, overrides, a ConfigDict passed to
a mode's `run`) is never checked.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from research.errors import UserError

PACKAGES = (
    *("research.tasks", "research.models", "research.data", "research.evaluators", "research.pretrained"),
    *("research.optimizer", "research.directions", "research.generation.decoding", "research.generation.diffusion"),
    *("research.configuration.transfer", "research.configuration.initial", "research.reporting.trackers"),
)
MADE = (
    *("Source", "Joined", "Renumbered", "Latents", "Dataset", "Tokenizer"),
    *("nn.Module", "tuple[Any, Report]", "Optimizer"),
    *("optax.GradientTransformation", "optax.GradientTransformationExtraArgs", "optax.Schedule"),
)
SECTIONS = ("research.sharding.make_mesh", "research.checkpoint.Checkpoints", "research.experiment.Log")
OPTAX = ("optax", "optax.contrib", "optax.schedules")

_SOURCES = pathlib.Path(__file__).parents[2]
_trusted: set[str] = set()


@contextlib.contextmanager
def also(modules: Sequence[str]) -> Iterator[None]:
    """Trust modules or packages, with all that is below them, until the context ends.

    Raises:
      UserError: one of them is not written like a module.
    """
    for module in modules:
        if not all(part.isidentifier() for part in module.split(".")):
            raise UserError(f"--trust: '{module}' is not a module; write it like mypackage or mypackage.models")
    before = set(_trusted)
    _trusted.update(modules)
    try:
        yield
    finally:
        _trusted.clear()
        _trusted.update(before)


def add(config: Any) -> None:
    """Trust the modules that a config names; the config is the user's own, or was checked."""
    for _, call in _calls(config, ""):
        module = str(call).rpartition(".")[0]
        if module and not _permitted(str(call)):
            _trusted.add(module)


def check(config: Any, file: pathlib.Path) -> None:
    """Check that every node of a config names only what a folder may name.

    Args:
      config: JSON, as read.
      file: where it was read, for the message.

    Raises:
      UserError: a node names something else.
    """
    for name, call in _calls(config, "config"):
        if isinstance(call, str) and _permitted(call):
            continue
        module = str(call).rpartition(".")[0]
        advice = (
            f"if you trust it, add --trust={module}" if isinstance(call, str) and module else "it is no dotted path"
        )
        raise UserError(f"{name}.call: {file} wants to call {call!r}, which a folder's config may not do; {advice}")


def _calls(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of every node that has a `call`, and that `call`."""
    if isinstance(node, dict | ConfigDict):
        if node.get("call") is not None:
            yield name, node["call"]
        for key in node:
            yield from _calls(node[key], f"{name}.{key}")
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _calls(value, f"{name}[{i}]")


def _permitted(path: str) -> bool:
    return any(_below(path, module) for module in _trusted) or _is_part(path)


def _below(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


@functools.cache
def _is_part(path: str) -> bool:
    """Return whether a dotted path names a part that configs are made of; our modules are parsed, not imported."""
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() and not part.startswith("_") for part in path.split(".")):
        return False
    if module in OPTAX:
        return _is_optax(module, name)
    if path not in SECTIONS and not any(_below(module, package) for package in PACKAGES):
        return False
    base = _SOURCES.joinpath(*module.split("."))
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not file.is_file():
        return False
    for found in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(found, ast.ClassDef) and found.name == name:
            return True
        if isinstance(found, ast.FunctionDef) and found.name == name:
            returns = ast.unparse(found.returns).strip("'") if found.returns else ""
            return path in SECTIONS or returns in MADE
    return False


def _is_optax(module: str, name: str) -> bool:
    """Return whether a public function of optax makes a gradient transformation or a schedule."""
    import optax  # here, as it takes a second that most commands need later or never

    found = getattr(importlib.import_module(module), name, None)
    if not inspect.isfunction(found) or not found.__module__.startswith("optax."):
        return False
    returns = found.__annotations__.get("return")
    return returns == optax.Schedule or "GradientTransformation" in getattr(returns, "__name__", str(returns))
