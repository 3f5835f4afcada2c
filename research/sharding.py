"""Where arrays live: a mesh of named axes, path rules for parameters, logical names for activations, split batches."""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.errors import UserError

AXES = ("data", "fsdp", "model")
Rules = Sequence[tuple[str, P]]

# The first rule that finds a path counts; its axes are those of the parameter's last dimensions, so that the leading
# axis of stacked layers needs no word. Moments and averages end in their parameter's path and follow it, and so
# do the codes and scales of packed kernels.
RULES: Rules = (
    (r"(query|key|value|up|gate)/kernel(_codes|_scales)?$", P("fsdp", "model")),
    (r"(out|down)/kernel(_codes|_scales)?$", P("model", "fsdp")),
    (r"/embedding$", P("model", "fsdp")),
    (r"/kernel(_codes|_scales)?$", P("fsdp", None)),
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


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    model: int = 1,
    shard_optimizer: bool = False,
    devices: Sequence[jax.Device] | int | None = None,
) -> Mesh:
    """Return a mesh over all devices of all processes.

    Args:
      data: groups of devices that hold the same parameters and different examples; -1 takes what the others leave.
      fsdp: devices over which parameters and examples are both split (fully sharded data parallelism).
      model: devices over which the width of the layers is split (tensor parallelism).
      shard_optimizer: see `state_shardings`; the mesh is the same.
      devices: other devices; or a number, for a mesh that has shapes and places nothing.
    """
    del shard_optimizer  # `Experiment` reads it where it places the state
    sizes = [data, fsdp, model]
    count = devices if isinstance(devices, int) else jax.device_count() if devices is None else len(devices)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh: sizes must be positive, one at most -1; they are {dict(zip(AXES, sizes))}")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // -math.prod(sizes) or 1
    if math.prod(sizes) != count:
        raise UserError(f"config.mesh: {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices; there are {count}")
    kinds = (AxisType.Auto,) * len(AXES)
    if isinstance(devices, int):
        return cast(Mesh, AbstractMesh(tuple(sizes), AXES, kinds))
    if devices is not None:  # in their own order: a plan asks what is exchanged, not over which link
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=kinds)
    return jax.make_mesh(sizes, AXES, axis_types=kinds)


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Return the NamedSharding of every leaf of a tree of parameters, as arrays or ShapeDtypeStructs.

    A dimension that its axis does not divide is replicated, and a line in the log says so.
    """
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: _by_rule(_path(keys), leaf.shape, mesh, rules), tree)


def state_shardings(state: Any, mesh: Mesh, shard_optimizer: bool = False, rules: Rules = RULES) -> Any:
    """Return the NamedSharding of every leaf of a train state, whose parameters are `state.params`.

    What an optimizer keeps of a parameter has a path that ends in the parameter's. It is split as the parameter is; of
    statistics of rows or columns (Shazeer 2018, section 3) the dimensions that are left are; all else is replicated.

    Args:
      state: a TrainState of arrays or ShapeDtypeStructs.
      mesh: the devices.
      shard_optimizer: whether to split the optimizer's state over "data" too, along the first dimension that can be
        (Rajbhandari 2019, the first stage of ZeRO).
      rules: of the parameters.
    """
    placed = shardings(state.params, mesh, rules)
    known = {
        _path(keys): (leaf.shape, sharding.spec)
        for (keys, leaf), sharding in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(placed))
    }

    def of_leaf(keys: tuple, leaf: Any) -> NamedSharding:
        parts = _path(keys).split("/")
        owner = next((known[path] for i in range(len(parts)) if (path := "/".join(parts[i:])) in known), None)
        spec = _kept(leaf.shape, *owner) if owner else P()
        if shard_optimizer and owner:
            spec = _over_data(leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    replicas = jax.tree.map(lambda _: replicated(mesh), state)
    opt_state = jax.tree_util.tree_map_with_path(of_leaf, state.opt_state)
    return replicas.replace(params=placed, opt_state=opt_state)


def _path(keys: tuple) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _by_rule(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> NamedSharding:
    spec = next(spec for pattern, spec in rules if re.search(pattern, path))
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)[max(len(spec) - len(shape), 0) :]
    fits = [a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape)]
    for axis, size, kept in zip(axes, shape, fits):
        if axis and not kept:
            logging.info("%s: %d is not divisible by the mesh's %s; replicated", path, size, axis)
    return NamedSharding(mesh, P(*fits))


def _kept(shape: tuple[int, ...], owner: tuple[int, ...], spec: P) -> P:
    """Return how to split what has the shape of its parameter, or lacks one of its dimensions."""
    axes = tuple(spec) + (None,) * (len(owner) - len(spec))
    if shape == owner:
        return spec
    for gone in range(len(owner)):
        if shape == owner[:gone] + owner[gone + 1 :]:
            return P(*axes[:gone], *axes[gone + 1 :])
    return P()


def _over_data(shape: tuple[int, ...], spec: P, mesh: Mesh) -> P:
    axes = list(spec) + [None] * (len(shape) - len(spec))
    for i, size in enumerate(shape):
        if axes[i] is None and size % mesh.shape["data"] == 0:
            return P(*axes[:i], "data", *axes[i + 1 :])
    return spec


def over(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with `constrain` acting on `mesh` while it is traced; jit the result."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def batch_ways() -> int:
    """Return over how many devices of the mesh of `over` a batch is split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in LOGICAL["batch"] or ())


def platform() -> str:
    """Return what is compiled for, "cpu", "gpu" or "tpu": the mesh of `over`'s, else that of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def device_kind() -> str:
    """Return what JAX calls the devices that are compiled for, such as "TPU v3"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


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


def on_each_device(function: Callable[..., Any], *arrays: jax.Array, shared: tuple[jax.Array, ...] = ()) -> Any:
    """Return what `function` makes of each device's rows, one after another: for what the compiler cannot split.

    Args:
      function: of the arrays and what is shared; returns arrays [B, ...], or with another first dimension, which then
        has as many parts as the batch has.
      *arrays: [B, ...]; a batch that the mesh does not divide stays whole.
      shared: what every device gets whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return function(*arrays, *shared)
    rows = P(LOGICAL["batch"]) if len(arrays[0]) % batch_ways() == 0 else P()
    specs = (rows,) * len(arrays) + (P(),) * len(shared)
    return jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)(*arrays, *shared)


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raise UserError unless every device gets the same number of rows of every microbatch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    parts = math.lcm(parts, jax.process_count())
    if batch_size % parts or batch_size < 1:
        near = max(round(batch_size / parts), 1) * parts
        raise UserError(
            f"config.batch_size: {batch_size} does not divide into {parts} parts (devices x microbatches); try {near}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def whole(array: jax.Array) -> np.ndarray:
    """Return all of an array, also where other processes hold parts of it, in which case all of them must ask."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices, as a part of the global batch.

    Args:
      batch: numpy arrays [B / processes, ...], in every process of the same shapes.
      mesh: over which the leading axis is split, by "data" and "fsdp".
    """
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}
