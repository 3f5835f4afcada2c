"""Prepares the data of a config ahead of a run: what its ops make of them that draws nothing, in the cache.

So is what the task computes of them before training, such as the likelihoods of a reference; that takes its weights.

Several processes, also on several machines with one cache, share the work when they are started at once.
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from research import precompute
from research.data.dataset import Dataset
from research.experiment import Experiment
from research.reporting.writers import Progress


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Prepare the data of training and of every evaluation, compare checksums, and make anew what is damaged.

    Args:
      config: of a run.
      workdir: the run's folder, whose tokenizer is taken where it is this config's.

    Returns:
      {"data": rows, "evals.NAME": rows}.

    Raises:
      UserError: the config or an example is wrong, or the cache cannot be written to.
    """
    experiment = Experiment(config, workdir=workdir)
    found = {"data": experiment.data}
    for name, evaluator in experiment.evaluators.items():
        # What an evaluator reads may be its data with a number for each example, which are other rows.
        dataset = getattr(evaluator, "dataset", getattr(evaluator, "data", None))
        found |= {f"evals.{name}": dataset} if isinstance(dataset, Dataset) else {}
    rows = {name: dataset.prepare() for name, dataset in found.items()}
    precompute.ready(experiment)
    Progress(0, 0).table("rows that are prepared", rows)
    return rows
