"""Initial values by path, instead of those that the model draws."""

import re
from typing import Any

import flax.traverse_util
import numpy as np

from research.errors import UserError, nearest
from research.pretrained.huggingface import Report


def zeros(patterns: tuple[str, ...], model: Any, params_shape: Any) -> tuple[Any, Report]:
    """Return zeros for some parameters, and leave the others as the model initialises them.

    `config.init = dict(call="research.configuration.initial.zeros", patterns=["^head/"])`.

    Args:
      patterns: regular expressions of the paths of the parameters to begin at zero.
      model: the model that they are for.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.

    Returns:
      The tree with numpy arrays of zeros, and `jax.ShapeDtypeStruct` for what is to be initialised.

    Raises:
      UserError: a pattern matches no parameter.
    """
    del model  # the paths say all
    shapes = flax.traverse_util.flatten_dict(params_shape, sep="/")
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in shapes):
            raise UserError(f"config.init.patterns: '{pattern}' finds no parameter{nearest(pattern, shapes)}")
    chosen = {name for name in shapes if any(re.search(pattern, name) for pattern in patterns)}
    tree = {name: np.zeros(x.shape, x.dtype) if name in chosen else x for name, x in shapes.items()}
    return flax.traverse_util.unflatten_dict(tree, sep="/"), Report((), ())
