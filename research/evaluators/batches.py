"""Runs a jitted function of (params, batch) over a dataset on all devices, for the evaluators."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research import sharding
from research.data.dataset import Dataset
from research.task import Params


def run(
    function: Callable[[Params, dict[str, jax.Array]], Any],
    params: Params,
    dataset: Dataset,
    mesh: Mesh,
    check: Callable[[], None],
) -> Iterator[Any]:
    """Yield the function's outputs for every batch of one epoch, as global numpy arrays in every process.

    Args:
      function: pure; jitted once per function, so pass a bound method of a frozen task.
      params: its first argument.
      dataset: every process reads its own rows.
      mesh: the mesh over which batches are sharded.
      check: called before each batch; may raise to abort.
    """
    sharding.check_batch_size(dataset.batch_size, mesh)
    jitted = _jit(function, mesh)
    for batch in dataset.epoch():
        check()
        yield jax.tree.map(np.asarray, jitted(params, sharding.place(batch, mesh)))


@functools.lru_cache
def _jit(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    return jax.jit(sharding.over(mesh, function), out_shardings=sharding.replicated(mesh))
