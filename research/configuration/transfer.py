"""Starting from the parameters that another run of this code has trained, whatever its task was."""

import re
from typing import Any

import flax.traverse_util

from research import sharding, storage
from research.errors import UserError, nearest
from research.evaluate import restore_params
from research.experiment import Experiment
from research.pretrained.huggingface import Report
from research.reporting.record import load_config


def load_params(
    path: str,
    model: Any,
    params_shape: Any,
    checkpoint: str = "",
    renames: tuple[tuple[str, str], ...] = (),
    new: tuple[str, ...] = ("^head",),
) -> tuple[Any, Report]:
    """Read a run's parameters.

    `config.init = dict(call="research.configuration.transfer.load_params", path="runs/pretraining")`.

    Args:
      path: the run's folder.
      model: the model that they are for.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.
      renames: (regular expression, replacement), applied in turn to the paths of the run's parameters.
      new: regular expressions of the paths that may be newly initialised; all others must be in the run.

    Returns:
      The tree with numpy arrays as leaves; what the run does not hold stays a ShapeDtypeStruct and is listed in the
      report.

    Raises:
      UserError: there is no run, or a parameter is missing or has another shape.
    """
    del model  # the parameters say all
    folder = storage.path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"config.init.path: there is no run in '{path}'; train it first, or name another one")
    config = load_config(folder)
    config.mesh = None  # that of the run may need other devices than there are
    _, params = restore_params(Experiment(config, workdir=folder), folder, checkpoint, plain=True)
    held = {_renamed(name, renames): leaf for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}
    wanted = flax.traverse_util.flatten_dict(params_shape, sep="/")
    fresh = {name for name in wanted if any(re.search(pattern, name) for pattern in new)}
    for name, shape in wanted.items():
        if name not in held and name not in fresh:
            raise UserError(
                f"the run in {path} has no parameter {name}{nearest(name, held)}; let `new` or `renames` say so"
            )
        if name not in fresh and held[name].shape != shape.shape:
            raise UserError(f"{name} has the shape {shape.shape} here, {held[name].shape} in the run in {path}")
    tree = {name: shape if name in fresh else sharding.whole(held[name]) for name, shape in wanted.items()}
    unused = sorted(name for name in held if name not in wanted or name in fresh)
    return flax.traverse_util.unflatten_dict(tree, sep="/"), Report(tuple(sorted(fresh)), tuple(unused))


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
