"""Experiment trackers: what metrics.jsonl gets goes to Weights & Biases or MLflow as well.

    config.log.trackers = [dict(call="research.reporting.trackers.WandB", project="reviews")]

None is used unless a config names it. A tracker never stops a run: one that fails is dropped with a warning.
"""

import importlib.util
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from research import storage
from research.errors import UserError
from research.reporting.record import read_json
from research.reporting.runs import flatten

IDS = "trackers.json"  # of the run's folder: what a resumed run goes on with
LONGEST = 500  # characters of a parameter's value that every version of MLflow takes


class Tracker(Protocol):
    """What `Trackers` drives, in process 0 alone; a frozen config value until `start`."""

    def start(self, workdir: pathlib.Path, config: Mapping[str, Any], known: str | None) -> str:
        """Begin, or go on with the run that `known` names, and return the run's id."""
        ...

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log numbers and pictures uint8 [height, width, 3] of a step."""
        ...

    def close(self, ended: bool) -> None:
        """Finish; `ended` is whether the run has reached its end."""
        ...


class WandB:
    """Weights & Biases (the extra "wandb"); its own variables, such as WANDB_MODE=offline, hold.

    Attributes:
      project: where the run is listed.
      entity: a user or a team; None for the default one.
      name: of the run; that of its folder where it is None.
      tags: of the run.
    """

    def __init__(self, project: str, entity: str | None = None, name: str | None = None, tags: tuple[str, ...] = ()):
        _require("wandb", "wandb")
        self._settings: dict[str, Any] = {"project": project, "entity": entity, "tags": list(tags)}
        self._name = name

    def start(self, workdir: pathlib.Path, config: Mapping[str, Any], known: str | None) -> str:
        """See `Tracker`."""
        import wandb

        folder = None if storage.is_remote(workdir) else str(workdir)
        name = self._name or workdir.name
        self._wandb = wandb
        self._run = wandb.init(
            **self._settings, name=name, id=known, resume="allow" if known else None, dir=folder, config=dict(config)
        )
        return self._run.id

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """See `Tracker`."""
        drawn = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._run.log({**scalars, **drawn}, step=step)

    def close(self, ended: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if ended else 1)


class MLflow:
    """MLflow (the extra "mlflow"); MLFLOW_TRACKING_URI and its other variables hold.

    Attributes:
      experiment: the name of the experiment that the run belongs to; made if it is not there.
      uri: of the server or the database; None for MLflow's own default.
      name: of the run; that of its folder where it is None.
    """

    def __init__(self, experiment: str, uri: str | None = None, name: str | None = None):
        _require("mlflow", "mlflow")
        self._experiment, self._uri, self._name = experiment, uri, name

    def start(self, workdir: pathlib.Path, config: Mapping[str, Any], known: str | None) -> str:
        """See `Tracker`."""
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(self._uri)
        if known:
            self._id = known
            self._client.set_terminated(known, "RUNNING")
            return known
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self._id = self._client.create_run(experiment, run_name=self._name or workdir.name).info.run_id
        for key, value in flatten(dict(config)).items():
            self._client.log_param(self._id, _key(key), str(value)[:LONGEST])
        return self._id

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """See `Tracker`."""
        for name, value in scalars.items():
            self._client.log_metric(self._id, _key(name), value, step=step)
        for name, picture in pictures.items():
            self._client.log_image(self._id, picture, artifact_file=f"{_key(name)}-{step}.png")

    def close(self, ended: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, "FINISHED" if ended else "KILLED")


class Trackers:
    """The trackers of a run, each of which is dropped when it fails."""

    def __init__(self, trackers: tuple[Tracker, ...], workdir: pathlib.Path, config: Mapping[str, Any]):
        """Begin, or go on with what trackers.json of the run's folder names."""
        self._left = dict(enumerate(trackers))
        if not self._left:
            return
        known = read_json(workdir / IDS) or {}
        names = {number: f"{type(tracker).__name__}-{number}" for number, tracker in self._left.items()}
        for number, name in names.items():
            if (made := self._try(number, "start", workdir, config, known.get(name))) is not None:
                known[name] = made
        storage.write(workdir / IDS, json.dumps(known).encode())

    def write(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log numbers and pictures of a step."""
        for number in list(self._left):
            self._try(number, "write", step, scalars, pictures)

    def close(self, ended: bool) -> None:
        """Finish."""
        for number in list(self._left):
            self._try(number, "close", ended)
        self._left = {}

    def _try(self, number: int, method: str, *arguments: Any) -> Any:
        tracker = self._left[number]
        try:
            return getattr(tracker, method)(*arguments)
        except Exception as error:  # of whatever kind, of a program and a network that are not ours
            del self._left[number]
            reason = " ".join(str(error).split()) or type(error).__name__
            logging.warning("%s: %s; the run goes on without it", type(tracker).__name__, reason)
            return None


def _key(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"config.log.trackers: {module} is not installed; pip install -e '.[{extra}]'")
