"""A checkpoint through config.evals; no training."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from research import precompute
from research.errors import UserError
from research.experiment import Experiment
from research.optimizer import evaluation_params
from research.reporting.record import write_json
from research.reporting.writers import Progress, write_pictures
from research.runtime.preemption import PreemptedError
from research.task import Params


class EvaluationError(Exception):
    """An evaluator failed; what was trained is not lost."""


def run(config: ConfigDict, workdir: pathlib.Path, checkpoint: str = "") -> dict[str, Any]:
    """Evaluate a checkpoint of the run in `workdir` and write evaluation.json, and pictures to figures/.

    Args:
      config: of the run, or with other `evals`.
      workdir: the run's folder.
      checkpoint: "latest", "best" or a step; "" takes the best where the run keeps it.

    Returns:
      {"step": ..., "metrics": {"name/metric": value}}.
    """
    experiment = Experiment(config, workdir=workdir)
    if not experiment.evaluators:
        raise UserError("config.evals: there is nothing to evaluate on")
    evaluators = precompute.evaluators(experiment)
    step, params = restore_params(experiment, workdir, checkpoint)
    progress = Progress(step, step)
    with progress.phase(f"evaluating the checkpoint of step {step}"):
        metrics, pictures = scores(evaluators, params)
    result = {"step": step, "metrics": metrics}
    if jax.process_index() == 0:
        write_pictures(workdir, step, pictures)
        write_json(workdir / "evaluation.json", result)
    progress.table(f"{workdir}, step {step}", metrics)
    return result


def scores(
    evaluators: Mapping[str, Callable[..., Mapping[str, float | np.ndarray]]],
    params: Params,
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return every evaluator's metrics, and its pictures uint8 [height, width, 3], as "name/metric".

    `check` may raise to give up between batches.

    Raises:
      EvaluationError: an evaluator failed.
    """
    found: dict[str, float | np.ndarray] = {}
    for name, evaluator in evaluators.items():
        try:
            metrics = evaluator(params, check)
        except (UserError, PreemptedError):
            raise
        except Exception as error:
            raise EvaluationError(f"config.evals.{name} failed ({type(error).__name__}: {error})") from error
        found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    pictures = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    return {name: float(value) for name, value in found.items() if name not in pictures}, pictures


def restore_params(
    experiment: Experiment, workdir: pathlib.Path, checkpoint: str, plain: bool = False
) -> tuple[int, Params]:
    """Return the step and the parameters of a checkpoint in `workdir`; see `restore_trained`, `Experiment.merged`."""
    step, params = restore_trained(experiment, workdir, checkpoint)
    return step, experiment.merged(params, plain)


def restore_trained(experiment: Experiment, workdir: pathlib.Path, checkpoint: str) -> tuple[int, Params]:
    """Return the step and the parameters, averaged where the run averages, of a checkpoint in `workdir`."""
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir: {workdir} holds no checkpoints")
    checkpoints = experiment.checkpoints(workdir, read_only=True)
    try:
        steps = checkpoints.steps()
        chosen = {"latest": steps[-1] if steps else None, "best": checkpoints.best_step()}
        step = chosen.get(checkpoint or ("best" if chosen["best"] is not None else "latest"))
        if step is None and checkpoint.isdigit() and int(checkpoint) in steps:
            step = int(checkpoint)
        if step is None:
            raise UserError(f"--checkpoint: '{checkpoint}' is not among latest, best, {', '.join(map(str, steps))}")
        state, _ = checkpoints.read(step, experiment.abstract_state)
        return step, evaluation_params(state.params, state.opt_state)
    finally:
        checkpoints.close()
