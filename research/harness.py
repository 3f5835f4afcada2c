"""A causal language model on the tasks of EleutherAI's evaluation harness (`lm_eval`, Gao 2024; the extra "evals")."""

import importlib.util
import logging
import os
import pathlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from ml_collections import ConfigDict

from research import generate, storage
from research.errors import UserError, nearest
from research.reporting.record import write_json

FILE = "harness.json"


def run(
    config: ConfigDict, workdir: pathlib.Path, harness: str, harness_include: str = "", checkpoint: str = ""
) -> dict[str, Any]:
    """Evaluate a checkpoint on tasks of the harness; print a table and write harness.json.

    Args:
      config: of the run. Its `batch_size` is that of the evaluation.
      workdir: the run's folder. If it holds no checkpoints, the weights that `config.init` names are taken.
      harness: names of tasks, groups or tags, separated by commas.
      harness_include: a folder with tasks of one's own, as YAML files, which count before others of the same name.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.

    Returns:
      {"step": ..., "metrics": {"task/metric": value}, "tasks": {task: its version, shots and examples}, "lm_eval": its
      version}. A metric's standard error is "task/metric_stderr"; where a task filters answers in several ways the
      filter's name follows the metric's.

    Raises:
      UserError: `lm_eval` is not installed, there is no such task, its data cannot be loaded, or the model is none
        that can be asked.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness: lm_eval is not installed; pip install -e '.[evals]'")
    if jax.process_count() > 1:
        raise UserError("--harness runs in one process")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of every default that a task leaves as it is
    # Processes that are forked for resampling would inherit the locks of JAX's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    experiment = generate.experiment_of(config, workdir)
    loaded = _load(harness, harness_include)

    import lm_eval
    from lm_eval.evaluator import evaluate

    from research.evaluators.harness_model import CausalModel

    step, params = generate.trained_or_published(experiment, workdir, checkpoint)
    model = CausalModel(experiment, params)
    found = evaluate(model, loaded, log_samples=False)
    tasks = {name: _facts(found, name) for name in found["results"]}
    result = {"step": step, "metrics": _metrics(found["results"]), "tasks": tasks, "lm_eval": lm_eval.__version__}
    write_json(workdir / FILE, result)
    title = f"{workdir}, {'the weights of config.init' if step is None else f'step {step}'}"
    rich.console.Console(file=sys.stderr, soft_wrap=True).print(_table(title, result))
    return result


def _load(harness: str, include: str) -> dict[str, Any]:
    """Return the tasks as `lm_eval.evaluator.evaluate` takes them, with its command's own seeds and shots."""
    from lm_eval import defaults
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(name.strip() for name in harness.split(",") if name.strip()))
    if not names:
        raise UserError("--harness: say which tasks, separated by commas, such as --harness=hellaswag,arc_easy")
    folder = None
    if include:
        if not storage.path(include).is_dir():
            raise UserError(f"--harness_include: there is no folder {include}")
        folder = str(storage.fetch(storage.path(include)))
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--harness: there is no task '{name}'{nearest(name, manager.all_tasks)}")
    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)
    try:
        loaded = manager.load(names)
    except Exception as error:  # of whatever library reads the task's data
        reason = " ".join(str(error).split())
        raise UserError(f"--harness: {', '.join(names)} cannot be loaded ({type(error).__name__}: {reason})") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"--harness: '{name}' runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"--harness: '{name}' shows images, and the model reads text alone")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)
    return loaded


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return {"task/metric": value} for the harness' {"task": {"metric,filter": value}}."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float):
                found[f"{task}/{name}" + (f",{kind}" if kind != "none" else "")] = float(value)
    return found


def _facts(found: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return what a number can be compared by: the task's version, the shots, and how many examples there were."""
    return {
        "version": found.get("versions", {}).get(task),
        "shots": found.get("n-shot", {}).get(task),
        "examples": found.get("n-samples", {}).get(task, {}).get("effective"),
    }


def _table(title: str, result: Mapping[str, Any]) -> rich.table.Table:
    table = rich.table.Table("", "value", "standard error", "shots", "examples", title=title, title_justify="left")
    metrics, tasks = result["metrics"], result["tasks"]
    for name, value in metrics.items():
        task, _, metric = name.rpartition("/")
        leaf, comma, kind = metric.partition(",")
        if leaf.endswith("_stderr"):
            continue
        error = metrics.get(f"{task}/{leaf}_stderr{comma}{kind}")
        facts = ["" if tasks[task][key] is None else str(tasks[task][key]) for key in ("shots", "examples")]
        table.add_row(name, f"{value:.4f}", "" if error is None else f"{error:.4f}", *facts)
    return table
