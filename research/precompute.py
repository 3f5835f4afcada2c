"""What a task computes of every row ahead of training, by the parameters that this begins with (`task.Precomputes`).

It is kept in the cache, under a key of the parameters, the model and the data. What is not there is computed from what
`config.init` names, or the seed, and never from what was trained, so that a run that goes on has the same numbers.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from research import sharding, storage
from research.data import keys
from research.data.beside import ROW, beside, count, numbered
from research.data.dataset import Dataset
from research.errors import UserError
from research.evaluators import batches
from research.evaluators.means import Means
from research.experiment import Experiment
from research.reporting.writers import Progress
from research.runtime.preemption import PreemptedError
from research.task import Batch, Params, Precomputes

VERSION = 1  # of the cached numbers
TELL = 10.0  # seconds
Values = dict[str, np.ndarray]


def ready(experiment: Experiment, check: Callable[[], None] = lambda: None) -> tuple[Dataset, dict[str, Any]]:
    """Return the training data and the evaluators of an experiment, with what the task computes of their rows.

    To be called in every process. `check` may raise PreemptedError to give up between batches.

    Raises:
      UserError: the rows are other ones in every epoch.
      PreemptedError: `check` did.
    """
    made = _beside(experiment, {"data": experiment.data, **_evaluated(experiment)}, check)
    return made.pop("data"), _replaced(experiment, made)


def evaluators(experiment: Experiment) -> dict[str, Any]:
    """Return the evaluators alone; the training data need not be there. See `ready`."""
    return _replaced(experiment, _beside(experiment, _evaluated(experiment), lambda: None))


def completing(experiment: Experiment) -> Callable[[Batch], Batch]:
    """Return a function that adds what the task computes ahead to batches of any rows, such as a user's.

    It holds the parameters that training began with, beside those that predict.
    """
    if (task := _computing(experiment)) is None:
        return lambda batch: batch
    params = experiment.merged(experiment.start_params())
    jitted = jax.jit(sharding.over(experiment.mesh, task.precompute))
    return lambda batch: {**batch, **jitted(params, batch)}


def _computing(experiment: Experiment) -> Precomputes | None:
    """Return the task if there is something that it computes ahead."""
    task = experiment.task
    return task if isinstance(task, Precomputes) and task.precomputed else None


def _evaluated(experiment: Experiment) -> dict[str, Dataset]:
    """Return the data on which `task.metrics` are evaluated, which need what is computed of them."""
    found = experiment.evaluators.items()
    return {f"evals.{name}": evaluator.data for name, evaluator in found if isinstance(evaluator, Means)}


def _replaced(experiment: Experiment, made: Mapping[str, Dataset]) -> dict[str, Any]:
    every: dict[str, Any] = dict(experiment.evaluators)
    with_data = (name for name in every if f"evals.{name}" in made)
    return every | {name: dataclasses.replace(every[name], data=made[f"evals.{name}"]) for name in with_data}


def _beside(experiment: Experiment, datasets: Mapping[str, Dataset], check: Callable[[], None]) -> dict[str, Dataset]:
    """Return datasets with the numbers of their rows; as they are where the task computes none."""
    if (task := _computing(experiment)) is None:
        return dict(datasets)
    params = experiment.merged(experiment.start_params())
    weights = _digest(params)
    # One function for all datasets: a program is compiled once a shape.
    passing = functools.partial(_of_batch, task)
    made: dict[str, Dataset] = {}
    for name, data in datasets.items():
        path = _path(experiment, task, weights, data)
        if (values := _read(path, task, count(data))) is None:
            values = _computed(task, passing, params, name, data, experiment.mesh, check)
            if path is not None and jax.process_index() == 0:
                storage.write_arrays(path, values)
        made[name] = beside(data, values)
    return made


def _of_batch(task: Precomputes, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Return what a task computes of a batch, with the numbers of its rows, and which of them are real."""
    made = task.precompute(params, batch)
    if missing := [name for name in task.precomputed if name not in made]:
        raise UserError(f"config.data.features: they lack what '{missing[0]}' is computed of")
    return {**made, ROW: batch[ROW], "mask": batch["mask"]}


def _computed(
    task: Precomputes,
    passing: Callable,
    params: Params,
    name: str,
    data: Dataset,
    mesh: Mesh,
    check: Callable[[], None],
) -> Values:
    """Return the numbers [N] of all rows, computed once each."""
    total, told = count(data), time.monotonic()
    values = {feature: np.zeros(total, np.float32) for feature in task.precomputed}
    progress = Progress(-(-total // data.batch_size), 0)
    try:
        with progress, progress.phase(f"{task.precomputed_title}: {total:,} rows of config.{name}"):
            every = batches.run(passing, params, numbered(data), mesh, check)
            for number, found in enumerate(every, start=1):
                real = found["mask"] > 0
                for feature in values:
                    values[feature][found[ROW][real]] = found[feature][real]
                progress.advance(number)
                if time.monotonic() - told > TELL:
                    told = time.monotonic()
                    progress.line(f"{task.precomputed_title}: {number * data.batch_size:,} of {total:,}")
    except PreemptedError:
        raise PreemptedError(f"stopped while computing {task.precomputed_title}; run the same command again") from None
    return values


def _digest(params: Params) -> list[str]:
    """Return what parameters are known by; one of them is in the host's memory at a time."""
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    return [keys.key_of(name, sharding.whole(flat[name])) for name in sorted(flat)]


def _path(experiment: Experiment, task: Precomputes, weights: list[str], data: Dataset) -> pathlib.Path | None:
    """Return where the numbers of a dataset's rows are kept; None where what it holds has no key."""
    model = experiment.task.model
    code = [VERSION, str(model), type(model), type(experiment.plain_task), list(task.precomputed)]
    return keys.cached("precomputed", code, weights, data.source, list(data.ops), list(data.features))


def _read(path: pathlib.Path | None, task: Precomputes, total: int) -> Values | None:
    """Return the numbers that process 0 has in its cache, in every process; None where they are to be computed."""
    there = path is not None and path.exists()
    if jax.process_count() > 1:
        there = bool(multihost_utils.broadcast_one_to_all(np.int32(there)))
    if not there:
        return None
    values = {name: np.zeros(total, np.float32) for name in task.precomputed}
    if path is not None and jax.process_index() == 0:
        with np.load(path) as stored:
            values = {name: stored[name] for name in task.precomputed}
    if jax.process_count() > 1:
        values = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(values))
    return values
