"""The training loop, the only one: what happens, and in which order."""

import contextlib
import functools
import math
import pathlib
import re
import time
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from research import evaluate, flops, precompute, sharding, storage
from research.checkpoint import Checkpoints
from research.data import agreement
from research.data.dataset import Dataset
from research.errors import UserError
from research.experiment import Experiment
from research.metrics import Mean
from research.optimizer import evaluation_params
from research.reporting import figures
from research.reporting.meter import Meter
from research.reporting.record import Record, peak_memory_bytes, read_json, write_json
from research.reporting.trackers import Trackers
from research.reporting.writers import METRICS, Progress, Writer, read_metrics
from research.runtime import hosts
from research.runtime.preemption import PreemptedError, Preemption
from research.step import TrainState, train_step


def run(
    config: ConfigDict, workdir: pathlib.Path, profile_steps: str | None = None, stop_at: str | float | None = None
) -> dict[str, Any]:
    """Train what a config names, evaluate it and write the run's folder; resume the run in the folder.

    Args:
      config: see README.md.
      workdir: holds at the end config.json, run.json, metrics.jsonl, result.json, tokenizer/, checkpoints/,
        tensorboard/, figures/.
      profile_steps: "10:15" traces the steps 10 to 14 into profile/, for xprof and Perfetto; None traces none.
      stop_at: a step, or a share of the run below 1, at which to evaluate, save and stop; None goes on to the end.

    Returns:
      what result.json holds.

    Raises:
      UserError: the config, or a file that it names, is wrong.
      PreemptedError: SIGTERM came, or `stop_at`; the state is saved.
      NonFiniteError: the loss or its gradient is not finite.
      UnreadableCheckpointError: the run has checkpoints, and none can be read.
      SaveError: a checkpoint cannot be written.
      EvaluationError: an evaluator failed; the state is saved.
    """
    traced = _steps(profile_steps)
    experiment = Experiment(config, workdir=workdir)
    experiment.build()
    last = _last_step(stop_at, experiment.num_steps)
    record = Record(workdir, experiment.resolved)
    if (result := read_json(workdir / "result.json")) is not None:
        Progress(experiment.num_steps, experiment.num_steps).table(f"{workdir}: finished before", summary(result))
        return result
    experiment.keep_tokenizer()
    _agree_on_data(experiment)
    with record, Preemption() as preemption:
        checkpoints = experiment.checkpoints(workdir)
        try:
            return _Loop(experiment, workdir, checkpoints, preemption, record, traced, last).run()
        finally:
            checkpoints.close()


def _agree_on_data(experiment: Experiment) -> None:
    """Raise UserError where processes read other data than process 0 does: they would train on without a word."""
    if jax.process_count() > 1:
        read: dict[str, Any] = {"data": experiment.data}
        read |= {f"evals.{name}.data": getattr(x, "data", None) for name, x in experiment.evaluators.items()}
        digests = {name: agreement.digest(x) for name, x in read.items() if isinstance(x, Dataset)}
        hosts.agree({f"what config.{name} holds": digest for name, digest in digests.items()})


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the lines of the table that is shown at the end."""
    rest = {key: value for key, value in result.items() if not isinstance(value, dict)}
    best = {f"best {k} (step {v['step']})": v["value"] for k, v in result.get("best", {}).items() if v}
    return result["metrics"] | best | rest


class _Loop:
    """The state of one attempt at a run."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        preemption: Preemption,
        record: Record,
        traced: range = range(0),
        last: int | None = None,
    ):
        self.last = last
        self.experiment, self.workdir, self.checkpoints, self.preemption = experiment, workdir, checkpoints, preemption
        self.traced, self.trace = traced, contextlib.ExitStack()
        self.tracing = False
        self.data, self.evaluators = precompute.ready(experiment, preemption.check)
        # Resume this run, else start from pretrained weights, else from scratch.
        restored = checkpoints.restore(experiment.abstract_state)
        self.state, extras = restored or (start(experiment), {})
        self.step = int(self.state.step)
        record.note(resumed_from=self.step if restored else None)
        self.batches = self.data.batches()
        if restored:
            self.batches.set_state(extras["data"])
        chip = flops.chip_of(jax.devices()[0])
        self.meter = Meter(extras.get("meter"), jax.device_count(), chip.peak / chip.devices if chip else None)
        self.operations: dict[Any, float] = {}
        self.evaluation: dict[str, Any] = extras.get("evaluation", {"step": 0, "metrics": {}, "best": None, "stale": 0})
        if self.evaluation["best"] and self.evaluation["best"]["metric"] != checkpoints.best:
            self.evaluation |= {"best": None, "stale": 0}
        self.unread: dict[str, Mean] | None = None
        self.writer = Writer(workdir, self.step, extras.get("lines", 0), trackers(experiment, workdir))
        self.progress = Progress(experiment.num_steps, self.step)
        if restored:
            self.progress.line(f"resumed from step {self.step}")
        self.compiled: dict[Any, Any] = {}
        self.mark = 0.0
        self.jitted = jit_step(experiment)

    def run(self) -> dict[str, Any]:
        self.lap()
        with self.progress, self.writer:
            while True:
                self.after_step()
                if self.finished():
                    break
                if self.last is not None and self.step >= self.last:
                    self.save(replace=self.evaluate())
                    raise PreemptedError(f"stopped at step {self.step}, as --stop_at says; without it the run goes on")
                if self.preemption.reached(self.step):
                    self.stop()
                self.take_step()
            self.checkpoints.wait()
            return self.finish()

    def take_step(self) -> None:
        """Dispatch one step, then reads the metrics of the one before, while the device computes."""
        self.profile()
        begin = time.monotonic()
        rows = next(self.batches)
        self.meter.add_seconds(wait=time.monotonic() - begin)
        batch = sharding.place(rows, self.experiment.mesh)
        step = self.compile(batch)
        self.meter.add_operations(self.operations[_shapes(batch)])
        self.state, metrics = step(self.state, batch)
        self.read_metrics()
        self.unread = metrics
        self.step += 1
        self.meter.add_batch(rows, jax.process_count())
        self.lap("train")
        self.progress.advance(self.step)

    def after_step(self) -> None:
        """Logs, evaluate and saves, each where it is due."""
        log, last = self.experiment.log, self.step == self.experiment.num_steps
        if self.step % log.every_steps == 0 or last:
            self.read_metrics()
            self.lap("train")
            self.checkpoints.check()
            if scalars := self.meter.flush():
                scalars |= self.source_epochs()
                if "peak_bytes_in_use" in (jax.local_devices()[0].memory_stats() or {}):
                    scalars["train/peak_memory_bytes"] = float(peak_memory_bytes())
                self.writer.write(self.step, scalars)
                self.progress.log(self.step, scalars)
        evaluating = last or (log.evaluate_every_steps and self.step and self.step % log.evaluate_every_steps == 0)
        every, evaluated = self.checkpoints.every_steps, False
        due = self.step and (last or (every and self.step % every == 0) or (evaluating and self.checkpoints.best))
        if evaluating:
            if due:
                self.save()  # before the evaluation, which may fail
            evaluated = self.evaluate()
        if due or (self.step and self.finished()):
            self.save(replace=evaluated)  # the one from before this evaluation does not know its result

    def source_epochs(self) -> dict[str, float]:
        """Return how many rows of a mixture the steps so far took, and how many epochs of each of its sources.

        Where rows are packed, these are what the number of rows in an epoch, an estimate, says.
        """
        data, rows = self.data, self.step * self.experiment.config.batch_size
        if data.mixture is None:
            return {}
        examples = round(rows / data.size * len(data.mixture))
        epochs = {f"train/epochs/{name}": value for name, value in data.mixture.epochs(examples).items()}
        return {"train/source_examples": float(examples), **epochs}

    def finished(self) -> bool:
        patience = self.checkpoints.patience
        exhausted = patience is not None and self.evaluation["stale"] >= patience
        return self.step >= self.experiment.num_steps or exhausted

    def evaluate(self) -> bool:
        """Evaluate unless this step was; return whether it did."""
        if not self.evaluators or self.evaluation["step"] == self.step > 0:
            return False
        self.read_metrics()
        self.lap("train")
        params = self.experiment.merged(evaluation_params(self.state.params, self.state.opt_state))
        try:
            with self.progress.phase(f"evaluating at step {self.step}"):
                metrics, pictures = evaluate.scores(self.evaluators, params, self.preemption.check)
        except PreemptedError:
            self.stop()
        except (evaluate.EvaluationError, UserError) as error:
            self.save()
            self.checkpoints.wait()
            kept = f"the checkpoint of step {self.step} is kept, and the same command resumes from it"
            raise type(error)(f"{error}; {kept}") from error.__cause__
        self.lap()
        self.writer.write(self.step, metrics, pictures)
        self.progress.line("  ".join([f"step {self.step}", *(f"{k} {v:.4f}" for k, v in metrics.items())]))
        self.evaluation |= {"step": self.step, "metrics": metrics}
        if self.checkpoints.best is not None:
            value, best = self.checkpoints.ranking(metrics), self.evaluation["best"]
            if math.isfinite(value) and (best is None or self.checkpoints.better(value, best["value"])):
                best = {"metric": self.checkpoints.best, "value": value, "step": self.step}
                self.evaluation |= {"best": best, "stale": 0}
            else:
                self.evaluation["stale"] += 1
        return True

    def save(self, replace: bool = False) -> None:
        self.read_metrics()  # a state whose loss is not finite is never saved
        self.lap("train")
        extras: dict[str, Any] = {"data": self.batches.get_state(), "meter": self.meter.state()}
        self.writer.flush()
        extras |= {"evaluation": self.evaluation, "lines": self.writer.lines}
        best = self.evaluation["best"]
        with self.progress.phase("saving", quiet=True):
            self.checkpoints.save(self.step, self.state, extras, best and best["step"], replace)
        self.lap()

    def stop(self) -> NoReturn:
        self.save()
        raise PreemptedError(f"stopped at step {self.step}; run the same command to go on")

    def profile(self) -> None:
        """Begin or end the trace, where this step is its first or the one after its last."""
        if self.step in self.traced and not self.tracing:
            folder = self.trace.enter_context(storage.writing(self.workdir / "profile"))
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
            self.tracing = True
        elif self.tracing and self.step not in self.traced:
            self.read_metrics()
            jax.profiler.stop_trace()
            self.trace.close()
            self.tracing = False
            self.progress.line(f"traced the steps {self.traced.start} to {self.traced.stop - 1} into profile/")

    def read_metrics(self) -> None:
        """Wait for the last step that was dispatched and add its metrics."""
        if self.unread is not None:
            metrics, self.unread = jax.device_get(self.unread), None
            self.meter.add_metrics(self.step, metrics)

    def lap(self, kind: str | None = None) -> None:
        """Count the time since the last call as "train" or "compile" seconds, or as neither."""
        now = time.monotonic()
        if kind is not None:
            self.meter.add_seconds(**{kind: now - self.mark})
        self.mark = now

    def compile(self, batch: dict[str, jax.Array]) -> Any:
        """Return the step compiled for the batch's shapes."""
        key = _shapes(batch)
        if key not in self.compiled:
            shape = " x ".join(map(str, max((x.shape for x in batch.values()), key=math.prod)))
            self.read_metrics()  # what still runs is training
            self.lap("train")
            with self.progress.phase(f"compiling the training step for a batch of {shape}"):
                self.compiled[key] = self.jitted.lower(self.state, batch).compile()
                self.operations[key] = flops.of_training(self.experiment.trained_task, self.state.params, batch)
            self.lap("compile")
        return self.compiled[key]

    def finish(self) -> dict[str, Any]:
        """Draw the curves and write result.json, last."""
        self.profile()
        self.writer.close()
        result = {"step": self.step, "metrics": self.evaluation["metrics"]}
        if best := self.evaluation["best"]:
            result["best"] = {best["metric"]: {"value": best["value"], "step": best["step"]}}
        result |= self.meter.summary() | {"peak_memory_bytes": peak_memory_bytes()}
        if jax.process_index() == 0:
            rows = read_metrics(self.workdir / METRICS)
            figures.curves({self.workdir.name: rows}, None, self.workdir / "figures" / "curves.png")
            write_json(self.workdir / "result.json", result)
            self.progress.table(str(self.workdir), summary(result))
        return result


def trackers(experiment: Experiment, workdir: pathlib.Path) -> Trackers | None:
    """Return the trackers that config.log names, begun, in the process that writes."""
    return Trackers(experiment.log.trackers, workdir, experiment.resolved) if jax.process_index() == 0 else None


def _shapes(batch: dict[str, jax.Array]) -> tuple:
    return tuple((name, x.shape) for name, x in batch.items())


def _steps(text: str | None) -> range:
    """Return the steps of "10:15", the last one left out, or raise UserError; none of None."""
    found = re.fullmatch(r"(\d+):(\d+)", text or "0:0")
    if found is None or (text and int(found[1]) >= int(found[2])):
        raise UserError(f"--profile_steps: '{text}' is not FIRST:END, such as 10:15")
    return range(int(found[1]), int(found[2]))


def _last_step(stop_at: str | float | None, num_steps: int) -> int | None:
    """Return the step at which to stop, of a step or of a share of the run, or raise UserError."""
    if stop_at is None:
        return None
    try:
        value = float(stop_at)
    except ValueError:
        value = 0.0
    if value <= 0 or (value >= 1 and value != int(value)):
        raise UserError(f"--stop_at: {stop_at} is neither a step nor a share of the run between 0 and 1")
    return int(value) if value >= 1 else math.ceil(value * num_steps)


def jit_step(experiment: Experiment) -> Any:
    """Return the training step, (state, batch) -> (state, metrics), to be compiled; the state stays where it is."""
    shardings = jax.tree.map(lambda x: x.sharding, experiment.abstract_state)
    return jax.jit(
        sharding.over(experiment.mesh, functools.partial(train_step, experiment.trained_task, experiment.optimizer)),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(experiment.mesh)),
    )


def start(experiment: Experiment) -> TrainState:
    """Return a new state, each array made where it lives; its parameters are pretrained where there are weights."""
    shardings = jax.tree.map(lambda x: x.sharding, experiment.abstract_state)
    loaded = experiment.pretrained()
    return jax.jit(experiment.init_state, out_shardings=shardings)(loaded)
