"""What a config names, as objects, each built when it is first asked for."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from research import sharding, step, storage
from research.build import build, invoke, locate
from research.checkpoint import Checkpoints, Elsewhere
from research.configuration import trust
from research.data.dataset import Dataset, Source
from research.data.tokenizer import read
from research.errors import UserError, nearest
from research.generation.decoding import Decoding
from research.optimizer import Optimizer, moving
from research.pretrained.pending import Pending
from research.reporting.record import read_config
from research.task import Adapts, Borrows, KeepsStart, NeedsWholeBatch, Params, Precomputes, Spec, Task

KEYS = (
    *("seed", "batch_size", "num_steps", "num_epochs", "tokenizer", "task", "init", "data", "evals"),
    *("optimizer", "mesh", "checkpoint", "log", "derived", "decoding", "plan"),
)
PLAN_KEYS = ("topology", "vocab_size", "length", "decoder_length", "examples", "published")  # see plan.py
# What a section without `call` configures.
SECTIONS = {
    "optimizer": "research.optimizer.make_optimizer",
    "init": "research.pretrained.huggingface.open_params",
    "mesh": "research.sharding.make_mesh",
    "checkpoint": "research.checkpoint.Checkpoints",
    "log": "research.experiment.Log",
    "decoding": "research.generation.decoding.Decoding",
}


@dataclasses.dataclass(frozen=True)
class Log:
    """What is logged and when.

    Attributes:
      every_steps: steps between lines of training metrics.
      evaluate_every_steps: steps between evaluations; 0 evaluates at the end only.
      trackers: where metrics go besides the run's folder: see `reporting.trackers`.
    """

    every_steps: int = 10
    evaluate_every_steps: int = 0
    trackers: tuple[Any, ...] = ()

    def __post_init__(self):
        if self.every_steps < 1 or self.evaluate_every_steps < 0:
            raise UserError("config.log: every_steps must be at least 1, evaluate_every_steps at least 0")


class Experiment:
    """The objects of one config.

    Attributes:
      config: the top level; see README.md for its keys. `derived`, which a run adds, is what its training data had to
        say, so that a checkpoint can be used without them.
    """

    def __init__(
        self,
        config: ConfigDict,
        source: Source | None = None,
        workdir: pathlib.Path | None = None,
        assumed: Mapping[str, Any] | None = None,
        devices: Sequence[jax.Device] | int | None = None,
    ):
        """Check the top level; nothing is built yet.

        Args:
          config: the top level.
          source: takes the place of the training data's.
          workdir: the run's folder, whose tokenizer is taken where it is this config's.
          assumed: takes the place of `derived`, and of the tokenizer, whose "vocab_size" may be in it.
          devices: see `sharding.make_mesh`; all that are here where it is None.
        """
        self.config = ConfigDict(json.loads(config.to_json()))  # as config.json holds it: plain values, no references
        trust.add(self.config)  # it was checked if it comes from a folder; otherwise it is the user's own
        self._source, self._workdir = source, workdir
        self._assumed, self._devices = assumed, devices
        _check(self.config)

    def build(self) -> None:
        """Build all that training needs, so that a mistake anywhere in the config is found before any work is done."""
        for name in ("mesh", "tokenizer", "data", "task", "evaluators", "optimizer", "log", "abstract_state"):
            getattr(self, name)
        if isinstance(self.trained_task, Adapts):
            self._check_adapter()
        if isinstance(self.task, NeedsWholeBatch) and self.optimizer.microbatches > 1:
            raise UserError(
                f"config.optimizer.microbatches: {type(self.task).__name__} compares the examples of a batch with each "
                "other, which parts of it cannot; set it to 1, and config.task.model's remat='full' to save memory"
            )
        for pattern in self._borrowed:
            if not self.config.get("init"):
                raise UserError(f"config.init: it is missing, and {self._others(pattern)}")
        for pattern in self.fixed:
            if pattern not in (self._section("optimizer").get("freeze") or ()):
                raise UserError(f"config.optimizer.freeze: '{pattern}' is missing, and {self._others(pattern)}")

    def _check_adapter(self) -> None:
        """Raise UserError unless the optimizer leaves the base alone and keeps no copy of it."""
        section, name = self._section("optimizer"), type(self.trained_task).__name__
        if "^base/" not in (section.get("freeze") or ()):
            raise UserError(f"config.optimizer.freeze: '^base/' is missing; {name} needs it")
        if isinstance(self.task, KeepsStart) and self.task.fixed:
            raise UserError(
                f"config.task.task: {type(self.task).__name__} keeps a copy of its start, which {name} does not hold; "
                "take an objective without a reference, such as simpo or orpo, or dpo or ipo with "
                "config.task.task.precompute_reference"
            )
        for key in ("average", "schedule_free"):
            if section.get(key) is not None:
                raise UserError(f"config.optimizer.{key}: it would keep and change a copy of the frozen base of {name}")

    @property
    def _borrowed(self) -> tuple[str, ...]:
        return self.task.borrowed if isinstance(self.task, Borrows) else ()

    @property
    def fixed(self) -> tuple[str, ...]:
        """Regular expressions of the parameters that are not the model's own: another run's, or of the start."""
        return self._borrowed + (self.task.fixed if isinstance(self.task, KeepsStart) else ())

    def _others(self, pattern: str) -> str:
        where = "come from another run" if pattern in self._borrowed else "stay as they are when training begins"
        return f"the parameters '{pattern}' of {type(self.task).__name__} {where}"

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices."""
        mesh = self._invoke("mesh", devices=self._devices)
        sharding.check_batch_size(self.config.batch_size, mesh, self._section("optimizer").get("microbatches", 1))
        return mesh

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None; the run's own, if it has one, is neither fetched nor trained again."""
        if self._assumed is not None:
            return None
        if self._kept:
            return read(storage.fetch(self._kept))
        return build(self.config.get("tokenizer"), "config.tokenizer")

    @functools.cached_property
    def _kept(self) -> pathlib.Path | None:
        """Where the run's tokenizer is, if its record has this config's."""
        if self._workdir is None or not (self._workdir / "tokenizer").is_dir():
            return None
        recorded = read_config(self._workdir) or {}
        same = recorded.get("tokenizer") == self.config.to_dict().get("tokenizer")
        return self._workdir / "tokenizer" if same else None

    def keep_tokenizer(self) -> None:
        """Put the tokenizer into the run's folder, at once; to be called before the config is recorded there."""
        if self.tokenizer is None or self._kept or not self._workdir or jax.process_index() != 0:
            return
        target = self._workdir / "tokenizer"
        if storage.is_remote(target):
            # No folder appears at once in a bucket: it counts from when the config is recorded beside it.
            storage.remove(self._workdir / "config.json")
            storage.remove(target)
            with storage.writing(target) as folder:
                self.tokenizer.save(folder)
            return
        temporary = self._workdir / f".tokenizer.{os.getpid()}"
        try:
            self.tokenizer.save(temporary)
            shutil.rmtree(target, ignore_errors=True)  # of an attempt that did not get far
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @functools.cached_property
    def data(self) -> Dataset:
        """The training data."""
        if self._source is None:
            return build(self.config.data, "config.data", **self._basics)
        # The source goes to the dataset alone, and not by name to whatever asks for one.
        node = {key: value for key, value in self.config.data.items() if key not in ("call", "source")}
        arguments = build(node, "config.data", **self._basics) | {"source": self._source}
        return invoke(locate(self.config.data["call"], "config.data"), arguments, "config.data", **self._basics)

    @functools.cached_property
    def derived(self) -> dict[str, Any]:
        """What the training data have to say: "label_names", "num_steps", and the "spec" of their batches."""
        if self._assumed is not None:
            return dict(self._assumed)
        if self.config.get("derived"):
            return self.config.derived.to_dict()
        num_steps = self.config.get("num_steps")
        if num_steps is None:
            num_steps = max(int(self.config.num_epochs * self.data.size / self.config.batch_size), 1)
        label = next((op.label_field for op in self.data.ops if hasattr(op, "label_field")), "label")
        return {
            "label_names": list(getattr(self.data.source, "label_names", {}).get(label, ())),
            "num_steps": num_steps,
            "spec": {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in self.data.spec.items()},
        }

    @functools.cached_property
    def label_names(self) -> tuple[str, ...]:
        """The names of the classes: the config's, or the training data's; () where there are none."""
        return tuple(task_section(self.config).get("label_names") or self.derived["label_names"])

    @functools.cached_property
    def task(self) -> Task:
        """The model and its objective: what evaluates and predicts."""
        return self.trained_task.evaluated if isinstance(self.trained_task, Adapts) else self.trained_task

    @property
    def plain_task(self) -> Task:
        """What `task` is without adapters beside its model: for the parameters that `merged` returns as `plain`."""
        return self.trained_task.task if isinstance(self.trained_task, Adapts) else self.trained_task

    @functools.cached_property
    def trained_task(self) -> Task:
        """What the step trains: the task, or what adapts it."""
        context = self._basics | {"mesh": self.mesh, "label_names": self.label_names, "decoding": self.decoding}
        if self.tokenizer is not None:
            context["vocab_size"] = self.tokenizer.vocab_size
        elif self._assumed and self._assumed.get("vocab_size"):
            context["vocab_size"] = self._assumed["vocab_size"]
        if self.label_names:
            context["num_outputs"] = len(self.label_names)
        elif task_section(self.config).get("objective") == "regression":
            context["num_outputs"] = 1
        return build(self.config.task, "config.task", **context)

    @functools.cached_property
    def evaluators(self) -> dict[str, Callable[..., dict[str, float]]]:
        """Name -> evaluator."""
        context = self._basics | {"mesh": self.mesh, "task": self.task, "decoding": self.decoding}
        evaluators = build(self.config.get("evals") or {}, "config.evals", **context)
        for name, evaluator in evaluators.items():
            if not callable(evaluator):
                raise UserError(f"config.evals.{name}: it is no evaluator; it needs a `call`")
        return evaluators

    @functools.cached_property
    def decoding(self) -> Decoding:
        """How text is generated."""
        return self._invoke("decoding")

    @property
    def num_steps(self) -> int:
        """The length of training."""
        return self.derived["num_steps"]

    @functools.cached_property
    def optimizer(self) -> Optimizer:
        """The optimizer; AdamW's unless the section has a `direction`."""
        return self._invoke("optimizer", num_steps=self.num_steps)

    @functools.cached_property
    def abstract_state(self) -> step.TrainState:
        """The train state's shapes, dtypes and shardings."""
        for name in ("trained_task", "optimizer", "spec"):
            getattr(self, name)  # built outside of the trace
        shapes = jax.eval_shape(self.init_state)
        placed = sharding.state_shardings(shapes, self.mesh, self._section("mesh").get("shard_optimizer", False))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)

    @property
    def spec(self) -> Spec:
        """The shapes and dtypes of the largest training batch, with what the task computes of the rows ahead."""
        spec = self.derived["spec"]
        ahead = self.task.precomputed if isinstance(self.task, Precomputes) else ()
        read = {name: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"]) for name, x in spec.items()}
        return read | dict.fromkeys(ahead, jax.ShapeDtypeStruct((self.config.batch_size,), "float32"))

    def init_state(self, loaded: Params | None = None) -> step.TrainState:
        """Return a new train state; pure. See `step.init_state`."""
        return step.init_state(self.trained_task, self.optimizer, self.spec, self.config.get("seed", 0), loaded)

    def pretrained(self, again: bool = False) -> Params | None:
        """Read the weights that `config.init` names; None where the parameters it lacks are to be initialised.

        `again` says that they were read before, and what is new announced.
        """
        if not self.config.get("init"):
            return None
        shapes, adapter = self._model_shapes, self.trained_task
        theirs = adapter.join(shapes) if isinstance(adapter, Adapts) else shapes
        loaded, report = self._invoke("init", model=self.task.model, params_shape=theirs)
        if lost := [name for name in report.new for pattern in self._borrowed if re.search(pattern, name)]:
            raise UserError(f"config.init: it lacks {lost[0]}, which must come from another run")
        if isinstance(adapter, Adapts):
            if lost := sorted(set(report.new) - set(flax.traverse_util.flatten_dict(shapes.get("whole", {}), sep="/"))):
                raise UserError(
                    f"config.init: it lacks {lost[0]}, which would stay random; name it in config.task.whole"
                )
            loaded = {**shapes, **adapter.divide(loaded)}
        if report.new and not again:
            logging.warning("newly initialised, as the weights hold none: %s", ", ".join(report.new))
        if report.unused and not again:
            logging.info("not used: %s", ", ".join(report.unused))

        def place(x: Any, shape: jax.ShapeDtypeStruct) -> jax.Array | None:
            if isinstance(x, jax.ShapeDtypeStruct):
                return None
            if isinstance(x, Pending):
                return x.place(shape.sharding)
            return jax.make_array_from_callback(x.shape, shape.sharding, lambda index: x[index])

        return jax.tree.map(place, loaded, shapes)

    @property
    def _model_shapes(self) -> Params:
        """The shapes of the parameters that weights are read for: all but what the task keeps of its start."""
        shapes = self.abstract_state.params
        return own(shapes, self.task.fixed) if isinstance(self.task, KeepsStart) else shapes

    def merged(self, params: Params, plain: bool = False) -> Params:
        """Return the parameters of `task`, or the `plain` ones of its model alone, for those of `trained_task`."""
        if not isinstance(self.trained_task, Adapts):
            return params
        return jax.jit(self.trained_task.plain if plain else self.trained_task.merge)(params)

    def checkpoints(self, workdir: pathlib.Path, read_only: bool = False) -> Checkpoints:
        """Open the checkpoints of the run in `workdir`."""
        elsewhere = Elsewhere(self._unsaved, self._read_unsaved) if self._unsaved else None
        folder = workdir / "checkpoints"
        return self._invoke("checkpoint", directory=folder, read_only=read_only, elsewhere=elsewhere)

    @property
    def _unsaved(self) -> tuple[str, ...]:
        """The paths of the parameters that checkpoints leave out: config.init gives them, and they are frozen.

        What is drawn from the seed is saved, as other devices may draw other last bits; so are the parameters of
        another run, such as a teacher's, without which its student must be of use.
        """
        section = self._section("optimizer")
        # The schedule-free parameters are interpolated anew at every step, and may lose the last bit, frozen or not.
        if not self.config.get("init") or section.get("schedule_free") is not None or section.get("call"):
            return ()
        trained = flax.traverse_util.flatten_dict(
            moving(section.get("freeze") or (), self.abstract_state.params), sep="/"
        )
        kept = [name for name in trained if any(re.search(pattern, name) for pattern in self._borrowed)]
        return tuple(name for name, trains in trained.items() if not trains and name not in kept)

    def _read_unsaved(self) -> dict[str, jax.Array]:
        """Return the parameters that checkpoints leave out as they are when training begins."""
        names = self._unsaved

        def chosen(params: Params) -> dict[str, Any]:
            flat = flax.traverse_util.flatten_dict(params, sep="/")
            return {name: flat[name] for name in names}

        return self.start_params(chosen)

    def start_params(self, chosen: Callable[[Params], Any] = dict) -> Any:
        """Return the parameters that training begins with, or what is `chosen` of them, each made where it lives."""
        shardings = jax.tree.map(lambda x: x.sharding, chosen(self.abstract_state.params))
        start = jax.jit(lambda loaded: chosen(self.init_state(loaded).params), out_shardings=shardings)
        return start(self.pretrained(again=True))

    @property
    def resolved(self) -> dict[str, Any]:
        """The config with what the data had to say, as JSON knows it."""
        return self.config.to_dict() | {"derived": self.derived}

    @functools.cached_property
    def log(self) -> Log:
        """What is logged and when."""
        return self._invoke("log")

    @property
    def _basics(self) -> dict[str, Any]:
        basics = {"seed": self.config.get("seed", 0), "batch_size": self.config.batch_size}
        return basics | ({"tokenizer": self.tokenizer} if self.tokenizer is not None else {})

    def _section(self, key: str) -> Mapping[str, Any]:
        section = self.config.get(key) or {}
        if not isinstance(section, Mapping | ConfigDict):
            raise UserError(f"config.{key}: {section!r} is not a section")
        return section

    def _invoke(self, key: str, **context: Any) -> Any:
        """Call what a section configures."""
        section = self._section(key)
        target = locate(section.get("call") or SECTIONS[key], f"config.{key}")
        arguments = build({k: section[k] for k in section if k != "call"}, f"config.{key}", **context)
        return invoke(target, arguments, f"config.{key}", **context)


def task_section(config: ConfigDict) -> ConfigDict:
    """Return the section of the task itself, inside of those that adapt it."""
    node = config.task
    while isinstance(node.get("task"), ConfigDict):
        node = node.task
    return node


def own(params: Params, fixed: Sequence[str]) -> Params:
    """Return the parameters whose path none of the regular expressions matches."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    kept = {name: leaf for name, leaf in flat.items() if not any(re.search(pattern, name) for pattern in fixed)}
    return flax.traverse_util.unflatten_dict(kept, sep="/")


def _check(config: ConfigDict) -> None:
    """Raise UserError unless the top level has the keys that it needs, and numbers where they must be."""
    for key in config:
        if key not in KEYS:
            raise UserError(f"config.{key}: there is no such key{nearest(key, KEYS)}")
    for key in config.get("plan") or ():
        if key not in PLAN_KEYS:
            raise UserError(f"config.plan.{key}: there is no such key{nearest(key, PLAN_KEYS)}")
    for key in ("batch_size", "task", "data"):
        if config.get(key) is None:
            raise UserError(f"config.{key}: it is missing")
    for key in ("task", "data"):
        if not isinstance(config[key], ConfigDict) or "call" not in config[key]:
            raise UserError(f"config.{key}: it must be a section with a `call`")
    if (config.get("num_steps") is None) == (config.get("num_epochs") is None):
        raise UserError("config.num_steps, config.num_epochs: set one of them, and only one")
    least = {"seed": 0, "batch_size": 1, "num_steps": 0, "num_epochs": 0}
    for key in least:
        value, kinds = config.get(key), (int, float) if key == "num_epochs" else (int,)
        if value is not None and type(value) not in kinds:
            raise UserError(f"config.{key}: {value!r} is not {'a number' if key == 'num_epochs' else 'an integer'}")
        if value is not None and value < least[key]:
            raise UserError(f"config.{key}: {value} is less than {least[key]}")
