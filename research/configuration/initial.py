"""Initial values by path, instead of those that the model draws."""

import re
from typing import Any

import flax.traverse_util
import numpy as np

from research.errors import UserError, nearest
from research.pretrained.huggingface import Report


def normal(
    deviations: tuple[tuple[str, float], ...], model: Any, params_shape: Any, seed: int = 0
) -> tuple[Any, Report]:
    """Return normal random numbers for some parameters, and leave the others as the model initialises them.

    `config.init = dict(call="research.configuration.initial.normal", deviations=[("^head/kernel$", 0.01)])`.

    Args:
      deviations: (regular expression, standard deviation), of which the first that finds a path counts; 0 for zeros.
      model: the model that they are for.
      params_shape: its parameters as a tree of `jax.ShapeDtypeStruct`.
      seed: of the draws.

    Returns:
      The tree with numpy arrays for what is drawn, and `jax.ShapeDtypeStruct` for what is to be initialised.

    Raises:
      UserError: a pattern matches no parameter.
    """
    del model  # the paths say all
    shapes = flax.traverse_util.flatten_dict(params_shape, sep="/")
    for pattern, _ in deviations:
        if not any(re.search(pattern, name) for name in shapes):
            raise UserError(f"config.init.deviations: '{pattern}' finds no parameter{nearest(pattern, shapes)}")

    def drawn(number: int, name: str) -> Any:
        found = (deviation for pattern, deviation in deviations if re.search(pattern, name))
        shape = shapes[name]
        if (deviation := next(found, None)) is None:
            return shape
        return (deviation * np.random.default_rng((seed, number)).normal(size=shape.shape)).astype(shape.dtype)

    tree = {name: drawn(number, name) for number, name in enumerate(sorted(shapes))}
    return flax.traverse_util.unflatten_dict(tree, sep="/"), Report((), ())
