"""Where arrays live: a mesh of named axes, path rules for parameters, logical names for activations, split batches."""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.errors import UserError

AXES = ("data", "fsdp", "model")
Rules = Sequence[tuple[str, P]]

# The first rule that finds a path counts; its axes are those of the parameter's last dimensions, so that the leading
# axis of stacked layers needs no word. Moments and averages end in their parameter's path and follow it.
RULES: Rules = (
    (r"(query|key|value|up|gate)/kernel$", P("fsdp", "model")),
    (r"(out|down)/kernel$", P("model", "fsdp")),
    (r"/embedding$", P("model", "fsdp")),
    (r"/kernel$", P("fsdp", None)),
    (r"", P()),
)

# The mesh axes over which each dimension of an activation is split. Examples are split over both axes that split the
# batch, so that only parameters are gathered over "fsdp"; what the "model" axis splits are the inner dimensions of a
# block (Shoeybi 2019, section 3), never the width between blocks.
LOGICAL: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "width": None,
    "heads": "model",
    "hidden": "model",
    "vocabulary": "model",
}


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1) -> Mesh:
    """Returns a mesh over all devices of all processes.

    Args:
      data: groups of devices that hold the same parameters and different examples; -1 takes what the others leave.
      fsdp: devices over which parameters and examples are both split (fully sharded data parallelism).
      model: devices over which the width of the layers is split (tensor parallelism).
    """
    sizes, count = [data, fsdp, model], jax.device_count()
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh: sizes must be positive, one at most -1; they are {dict(zip(AXES, sizes))}")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // -math.prod(sizes) or 1
    if math.prod(sizes) != count:
        raise UserError(f"config.mesh: {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices; there are {count}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns the NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs.

    A dimension that its axis does not divide is replicated, and a line in the log says so.
    """

    def of_leaf(keys: tuple, leaf: Any) -> NamedSharding:
        path = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
        spec = next(spec for pattern, spec in rules if re.search(pattern, path))
        axes = (None,) * (leaf.ndim - len(spec)) + tuple(spec)[max(len(spec) - leaf.ndim, 0) :]
        fits = [a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(axes, leaf.shape)]
        for axis, size, kept in zip(axes, leaf.shape, fits):
            if axis and not kept:
                logging.info("%s: %d is not divisible by the mesh's %s; replicated", path, size, axis)
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def over(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with `constrain` acting on `mesh` while it is traced; jit the result."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Return `x` with each dimension split over the mesh as its logical name says; the identity on one device.

    Without it the compiler may keep the whole batch on every device where parameters are fully sharded.

    Args:
      x: an activation; a dimension that the mesh does not divide stays whole.
      names: of the first dimensions, from `LOGICAL`; None, and what is left out, leaves a dimension to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x

    def axes(name: str | None, size: int) -> Any:
        if name is None:
            return P.UNCONSTRAINED
        split = LOGICAL[name]
        ways = math.prod(mesh.shape[axis] for axis in ([split] if isinstance(split, str) else split or ()))
        return split if size % ways == 0 else P.UNCONSTRAINED

    named = [axes(name, size) for name, size in zip(names, x.shape)]
    return jax.lax.with_sharding_constraint(x, P(*named, *[P.UNCONSTRAINED] * (x.ndim - len(named))))


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises UserError unless every device gets the same number of rows of every microbatch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    parts = math.lcm(parts, jax.process_count())
    if batch_size % parts or batch_size < 1:
        near = max(round(batch_size / parts), 1) * parts
        raise UserError(
            f"config.batch_size: {batch_size} does not divide into {parts} parts (devices x microbatches); try {near}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, padding: Mapping[str, float]) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices, as a part of the global batch.

    Args:
      batch: numpy arrays [B / processes, ...].
      mesh: over which the leading axis is split, by "data" and "fsdp".
      padding: features whose second axis is a length that processes must agree on, and what fills them up.
    """
    if jax.process_count() > 1 and padding:
        own = np.array([batch[name].shape[1] for name in padding], np.int32)
        longest = multihost_utils.process_allgather(own).max(axis=0).tolist()
        fills = zip(padding.items(), longest)
        batch = dict(batch) | {name: pad(np.asarray(batch[name]), length, fill) for (name, fill), length in fills}
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def pad(rows: np.ndarray, length: int, fill: float) -> np.ndarray:
    """Fills the second axis of [B, T, ...] up to `length`."""
    widths = [(0, 0), (0, length - rows.shape[1])] + [(0, 0)] * (rows.ndim - 2)
    return np.pad(rows, widths, constant_values=fill)
