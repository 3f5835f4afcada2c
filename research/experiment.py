"""What a config names, as objects, each built when it is first asked for."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from research import optimizer, sharding, step
from research.build import build, invoke, locate
from research.checkpoint import Checkpoints
from research.data.dataset import Dataset
from research.errors import UserError, nearest
from research.pretrained import huggingface
from research.task import Params, Task

KEYS = ("seed", "batch_size", "num_steps", "num_epochs", "tokenizer", "task", "init", "data", "evals")
KEYS += ("optimizer", "mesh", "checkpoint", "log")


@dataclasses.dataclass(frozen=True)
class Log:
    """What is logged and when.

    Attributes:
      every_steps: steps between lines of training metrics.
      evaluate_every_steps: steps between evaluations; 0 evaluates at the end only.
    """

    every_steps: int = 10
    evaluate_every_steps: int = 0


class Experiment:
    """The objects of one config.

    Attributes:
      config: the top level; see README.md for its keys.
    """

    def __init__(self, config: ConfigDict, source: Sequence[dict[str, Any]] | None = None):
        """Checks the top level; nothing is built yet. `source` takes the place of the training data's."""
        for key in config:
            if key not in KEYS:
                raise UserError(f"config.{key}: there is no such key{nearest(key, KEYS)}")
        for key in ("batch_size", "task", "data"):
            if config.get(key) is None:
                raise UserError(f"config.{key}: it is missing")
        if (config.get("num_steps") is None) == (config.get("num_epochs") is None):
            raise UserError("config.num_steps, config.num_epochs: set one of them, and only one")
        for key in ("seed", "batch_size", "num_steps"):
            if not isinstance(config.get(key) or 0, int):
                raise UserError(f"config.{key}: {config[key]!r} is not an integer")
        self.config = config
        self._source = source

    def build(self) -> None:
        """Builds all that training needs, so that a mistake anywhere in the config is found before any work is done."""
        for name in ("mesh", "tokenizer", "data", "task", "evaluators", "optimizer", "log", "abstract_state"):
            getattr(self, name)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices."""
        mesh = invoke(sharding.make_mesh, self._section("mesh"), "config.mesh")
        sharding.check_batch_size(self.config.batch_size, mesh, self._section("optimizer").get("microbatches", 1))
        return mesh

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return build(self.config.get("tokenizer"), "config.tokenizer")

    @functools.cached_property
    def data(self) -> Dataset:
        """The training data."""
        node = dict(self.config.data.items())
        return build(node if self._source is None else node | {"source": self._source}, "config.data", **self._basics)

    @functools.cached_property
    def label_names(self) -> tuple[str, ...]:
        """The names of the classes: the config's, or the training data's; () where there are none."""
        given = self.config.task.get("label_names")
        return tuple(given or getattr(self.data.source, "label_names", {}).get("label", ()))

    @functools.cached_property
    def task(self) -> Task:
        """The model and its objective."""
        context = self._basics | {"mesh": self.mesh, "label_names": self.label_names}
        if self.label_names:
            context["num_outputs"] = len(self.label_names)
        return build(self.config.task, "config.task", **context)

    @functools.cached_property
    def evaluators(self) -> dict[str, Callable[..., dict[str, float]]]:
        """Name -> evaluator."""
        context = self._basics | {"mesh": self.mesh, "task": self.task}
        return build(self.config.get("evals") or {}, "config.evals", **context)

    @functools.cached_property
    def num_steps(self) -> int:
        """The length of training."""
        if self.config.get("num_steps") is not None:
            return self.config.num_steps
        return max(int(self.config.num_epochs * len(self.data.source) / self.config.batch_size), 1)

    @functools.cached_property
    def optimizer(self) -> optimizer.Optimizer:
        """The optimizer; AdamW unless the section has a `call`."""
        section = self._section("optimizer")
        target = locate(section.pop("call"), "config.optimizer") if "call" in section else optimizer.adamw
        return invoke(target, section, "config.optimizer", num_steps=self.num_steps)

    @functools.cached_property
    def abstract_state(self) -> step.TrainState:
        """The train state's shapes, dtypes and shardings."""
        shapes = jax.eval_shape(self.init_state)
        placed = sharding.shardings(shapes, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)

    def init_state(self, loaded: Params | None = None) -> step.TrainState:
        """Returns a new train state; pure. See `step.init_state`."""
        return step.init_state(self.task, self.optimizer, self.data.spec, self.config.get("seed", 0), loaded)

    def pretrained(self) -> Params | None:
        """Reads the weights that `config.init` names; None where the parameters it lacks are to be initialised."""
        section = self._section("init")
        if not section:
            return None
        target = locate(section.pop("call"), "config.init") if "call" in section else huggingface.load_params
        shapes = self.abstract_state.params
        loaded, report = invoke(target, section, "config.init", model=self.task.model, params_shape=shapes)
        if report.new:
            logging.warning("newly initialised, as the weights hold none: %s", ", ".join(report.new))
        if report.unused:
            logging.info("not used: %s", ", ".join(report.unused))

        def place(x: Any, shape: jax.ShapeDtypeStruct) -> jax.Array | None:
            if isinstance(x, jax.ShapeDtypeStruct):
                return None
            return jax.make_array_from_callback(x.shape, shape.sharding, lambda index: x[index])

        return jax.tree.map(place, loaded, shapes)

    def checkpoints(self, workdir: pathlib.Path, read_only: bool = False) -> Checkpoints:
        """Opens the checkpoints of the run in `workdir`."""
        section, directory = self._section("checkpoint"), workdir / "checkpoints"
        return invoke(Checkpoints, section, "config.checkpoint", directory=directory, read_only=read_only)

    @property
    def resolved(self) -> dict[str, Any]:
        """The config as JSON knows it, with what the data had to say filled in."""
        config = json.loads(json.dumps(self.config.to_dict()))
        if self.label_names:
            config["task"]["label_names"] = list(self.label_names)
        return config

    @functools.cached_property
    def log(self) -> Log:
        """What is logged and when."""
        return invoke(Log, self._section("log"), "config.log")

    @property
    def _basics(self) -> dict[str, Any]:
        basics = {"seed": self.config.get("seed", 0), "batch_size": self.config.batch_size}
        return basics | ({"tokenizer": self.tokenizer} if self.tokenizer is not None else {})

    def _section(self, key: str) -> dict[str, Any]:
        section = self.config.get(key) or {}
        if not isinstance(section, Mapping | ConfigDict):
            raise UserError(f"config.{key}: {section!r} is not a section")
        return build({k: v for k, v in section.items() if k != "call"}, f"config.{key}") | (
            {"call": section["call"]} if "call" in section else {}
        )
