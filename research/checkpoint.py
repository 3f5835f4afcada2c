"""Checkpoints by Orbax: asynchronous, atomic, verified when they are read.

A checkpoint holds the train state, the position in the data and a checksum of every array. The checksums are computed
on the devices that hold the arrays, before saving and after restoring, so that a damaged file is never trusted.
Parameters that never change and can be read from where they came are left out; their checksums are there.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from research import storage
from research.errors import UserError, nearest
from research.runtime.staging import Staged, dropped_steps
from research.step import TrainState


class UnreadableCheckpointError(Exception):
    """A checkpoint is damaged, or a run has checkpoints and all of them are."""


class SaveError(Exception):
    """A checkpoint could not be written, because the disk is full for example; those before it are whole."""


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Parameters that checkpoints leave out, because they never change and can be read again where they came from.

    Attributes:
      names: their paths.
      read: () -> {path: array} of these parameters, each where the train state has it.
    """

    names: tuple[str, ...]
    read: Callable[[], dict[str, jax.Array]]


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      best: the evaluation metric by which the best checkpoint is kept, "test/accuracy"; None keeps only the latest.
      mode: "max" or "min".
      every_steps: steps between saves; 0 saves at the end only.
    """

    def __init__(
        self,
        directory: Any,
        every_steps: int = 0,
        keep: int = 2,
        keep_every: int | None = None,
        best: str | None = None,
        mode: str = "max",
        patience: int | None = None,
        read_only: bool = False,
        elsewhere: Elsewhere | None = None,
    ):
        """Open a folder of checkpoints.

        Args:
          directory: the folder, a path as `storage.path` makes it; made on the first save.
          every_steps: as above.
          keep: how many of the latest are kept; at least 2, so that a damaged one has a predecessor.
          keep_every: checkpoints of every so many steps are never deleted; a multiple of `every_steps`.
          best: as above.
          mode: as above.
          patience: stop early after that many evaluations without a better `best`; None never does.
          read_only: never write or delete.
          elsewhere: the parameters that are not saved; None saves all. What was saved with all is read as it is.
        """
        if mode not in ("max", "min"):
            raise UserError(f"config.checkpoint.mode: '{mode}' is neither 'max' nor 'min'")
        if keep < 1 or every_steps < 0:
            raise UserError(
                f"config.checkpoint: keep ({keep}) must be at least 1, every_steps ({every_steps}) at least 0"
            )
        if keep_every is not None and (keep_every < 1 or every_steps == 0 or keep_every % every_steps):
            raise UserError(
                f"config.checkpoint.keep_every: {keep_every} is not a multiple of every_steps, {every_steps}"
            )
        if patience is not None and best is None:
            raise UserError("config.checkpoint.patience: early stopping needs config.checkpoint.best, a metric's name")
        if mode == "min" and best is None:
            raise UserError("config.checkpoint.mode: it says how config.checkpoint.best is ranked, which is not set")
        self.best, self.mode, self.every_steps, self.patience = best, mode, every_steps, patience
        self._directory = directory
        self._kept = _Kept(keep, keep_every)
        self._staged = Staged(directory) if storage.scheme(directory) not in ("file", "gs") else None
        self._read_only, self._elsewhere = read_only, elsewhere
        self._manager = self._open()

    def save(
        self, step: int, state: TrainState, extras: Mapping[str, Any], best: int | None = None, replace: bool = False
    ) -> None:
        """Begin to save; return once the arrays are copied.

        Args:
          step: a checkpoint of it that exists is left alone, but for its extras where they are to be replaced.
          state: the arrays.
          extras: JSON.
          best: the step with the best metric so far; its checkpoint is kept.
          replace: whether to replace the extras of a checkpoint of this step, whose arrays are the same.

        Raises:
          SaveError: this save, or the one before it, failed.
        """
        if self._staged:
            with _saving():
                self._staged.wait()
        exists = step in self.steps()
        if exists and not replace:
            return
        self._kept.best = best
        arrays = _describe(state, _sums(jax.tree.leaves(state)))
        # A copy: Orbax writes it later, in a thread, while the caller changes it.
        outside = list(self._elsewhere.names) if self._elsewhere else []
        if exists:  # its arrays stay, and what they leave out
            self.wait()
            outside = self._extras(step).get("elsewhere", [])
        content = json.loads(json.dumps({**extras, "arrays": arrays, "elsewhere": outside, "best": best}))
        content |= {"digest": _digest(content)}
        with _saving():
            if exists:
                self._replace_extras(step, content)
                return
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_without(state, outside)), extras=ocp.args.JsonSave(content)
                ),
                force=True,
            )
            if self._staged:
                self._manager.wait_until_finished()
                self._staged.push(step, self._kept)

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the latest readable checkpoint, as (state, extras), or None where there is none at all.

        Args:
          target: ShapeDtypeStructs with shardings: the mesh may be another than the one that saved.

        Raises:
          UnreadableCheckpointError: there are checkpoints, and none is readable.
        """
        steps = self.steps()[::-1]
        for step in steps:
            try:
                restored = self.read(step, target)
            except UnreadableCheckpointError as error:
                logging.warning("%s; trying the one before", error)
                continue
            for newer in (s for s in steps if s > step):  # their steps can be saved again, and nothing is lost
                self._rename(newer, self._unused_name(newer))
            return restored
        if steps:
            raise UnreadableCheckpointError(f"none of the checkpoints {steps[::-1]} in {self._directory} can be read")
        return None

    def read(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read and verifies one checkpoint.

        Raises:
          UnreadableCheckpointError: it is damaged.
          UserError: it is whole and holds other arrays than `target`, or what it leaves out is not what it was.
        """
        failure: Exception | None = None
        try:
            extras = self._extras(step)
            wanted, stored, outside = _describe(target), extras.pop("arrays"), extras.pop("elsewhere", [])
            _check_arrays(f"{self._directory / str(step)}", wanted, stored)
            if self._staged:
                self._staged.fetch(step)
                self._reopen()
            saved = ocp.args.StandardRestore(_without(target, outside))
            state = self._manager.restore(step, args=ocp.args.Composite(state=saved))["state"]
        except UserError:
            raise
        except Exception as error:  # whatever damaged bytes make Orbax, TensorStore or JSON raise
            failure = error
        if not _everywhere(failure is None):
            reason = _reason(failure) if failure else "another process says so"
            if failure:
                self._check_reached(step, failure)
            raise UnreadableCheckpointError(f"checkpoint {step} is unreadable ({reason})") from failure
        found = _describe(state, _sums(jax.tree.leaves(state)))
        if found != {path: stored[path] for path in found}:
            raise UnreadableCheckpointError(f"checkpoint {step} is unreadable (its checksums are not those saved)")
        return self._with(state, outside, stored), extras

    def _with(self, state: TrainState, outside: Sequence[str], stored: Mapping[str, list[Any]]) -> TrainState:
        """Return a state with what its checkpoint leaves out, or raise UserError where that is not what it was."""
        if not outside:
            return state
        if self._elsewhere is None:
            raise UserError(f"config.init: it is missing, and gave {outside[0]}, which {self._directory} does not hold")
        read = self._elsewhere.read()
        for name, number in zip(outside, np.asarray(_sums([read[name] for name in outside]))):
            if int(number) != stored[f"params/{name}"][1]:
                raise UserError(
                    f"config.init: {name} is not what it was when the run began; name the same weights, or the step of "
                    "a run that went on"
                )
        params = _flat(state.params) | {name: read[name] for name in outside}
        return _of(state, params)

    def _extras(self, step: int) -> dict[str, Any]:
        """Read and verifies what is not an array."""
        extras = json.loads(self._extras_file(step).read_bytes())
        if extras.pop("digest", None) != _digest(extras):
            raise ValueError("its checksum is not the one saved")
        return extras

    def steps(self) -> list[int]:
        """Return the steps that were saved, ascending."""
        return self._staged.steps() if self._staged else sorted(self._manager.all_steps())

    def ranking(self, metrics: Mapping[str, float]) -> float:
        """Return the value that checkpoints are ranked by."""
        if self.best is None or self.best not in metrics:
            raise UserError(
                f"config.checkpoint.best: no evaluation gives '{self.best}'{nearest(str(self.best), metrics)}"
            )
        return metrics[self.best]

    def better(self, value: float, other: float) -> bool:
        """Return whether a value ranks above another."""
        return value > other if self.mode == "max" else value < other

    def best_step(self) -> int | None:
        """Return the step with the best metric so far, as the latest readable checkpoint knows it, or None."""
        for step in reversed(self.steps() if self.best else []):
            try:
                return self._extras(step)["best"]
            except Exception as error:  # `read` says what is wrong with it
                self._check_reached(step, error)
        return None

    def check(self) -> None:
        """Raise SaveError if a save that has ended failed."""
        with _saving():
            self._manager.check_for_errors()
            if self._staged:
                self._staged.check()

    def wait(self) -> None:
        """Return when every save has ended; raise SaveError if one failed."""
        with _saving():
            self._manager.wait_until_finished()
            if self._staged:
                self._staged.wait()

    def close(self) -> None:
        """Wait and let go of the folder."""
        with _saving():
            self._manager.close()
            if self._staged:
                self._staged.close()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            epath.Path(str(self._staged.local if self._staged else self._directory.absolute())),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
                create=not self._read_only,
                # Opening reads no file of a checkpoint, since damaged ones make it raise; `read` says which are.
                lightweight_initialize=True,
            ),
            item_names=("state", "extras"),
        )

    def _reopen(self) -> None:
        """Look at the folder again; Orbax's `reload` would read a file of each checkpoint."""
        self._manager.close()
        self._manager = self._open()

    def _check_reached(self, step: int, error: Exception) -> None:
        """Raise OSError where a bucket did not answer, which says nothing of the checkpoint."""
        if storage.is_remote(self._directory) and storage.is_outage(error):
            raise OSError(f"checkpoint {step} in {self._directory} cannot be reached ({_reason(error)})") from error

    def _extras_file(self, step: int) -> pathlib.Path:
        """Where Orbax puts the extras of a step: one file, which is replaced at once wherever it is."""
        return self._directory / str(step) / "extras" / "metadata"

    def _replace_extras(self, step: int, content: Mapping[str, Any]) -> None:
        """Replace the extras of a checkpoint, and delete those that are no longer kept, such as one that was best."""
        if jax.process_index() == 0:
            storage.write(self._extras_file(step), json.dumps(content).encode())
        multihost_utils.sync_global_devices(f"extras-{step}")
        for dropped in dropped_steps(self._kept, self.steps()):
            self._staged.delete(dropped) if self._staged else self._manager.delete(dropped)

    def _rename(self, step: int, path: pathlib.Path) -> None:
        """Give a checkpoint a name that is not a step's."""
        if jax.process_index() == 0:
            storage.rename(self._directory / str(step), path)
        multihost_utils.sync_global_devices(path.name)
        self._reopen()

    def _unused_name(self, step: int) -> pathlib.Path:
        names = (self._directory / f"unreadable-{step}-{i}" for i in range(1000))
        return next(name for name in names if not name.exists())


class _Kept(checkpoint_managers.PreservationPolicy):
    """Which checkpoints are not deleted: the latest, the best, and milestones."""

    def __init__(self, latest: int, every: int | None):
        self.latest, self.every = latest, every
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return for each checkpoint, in ascending order, whether it stays."""
        del context
        first = len(checkpoints) - self.latest

        def kept(i: int, step: int) -> bool:
            return i >= first or step == self.best or (self.every is not None and step % self.every == 0)

        return [kept(i, checkpoint.step) for i, checkpoint in enumerate(checkpoints)]


def _flat(params: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def _of(state: TrainState, flat: Mapping[str, Any]) -> TrainState:
    """Return a state with other parameters."""
    params = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
    return TrainState(state.step, params, state.opt_state, state.rng)


def _without(state: TrainState, outside: Sequence[str]) -> TrainState:
    """Return a state without some of its parameters."""
    kept = {name: leaf for name, leaf in _flat(state.params).items() if name not in set(outside)}
    return _of(state, kept) if outside else state


def quieten() -> None:
    """Keep the pages that Orbax prints about an error off the screen, process-wide.

    It logs what it raises, leaves coroutines behind, and closes event loops that TensorStore's threads still report to.
    What goes wrong is raised, and said once, by `Checkpoints`.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in pathlib.Path(record.pathname).parts)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if str(unraisable.exc_value) != "Event loop is closed" and not (code and "orbax" in code.co_filename):
            before(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    """Turn what Orbax and TensorStore raise where they cannot write into SaveError."""
    try:
        yield
    except Exception as error:
        raise SaveError(f"a checkpoint could not be saved ({_reason(error)}); those before it are kept") from error


def _everywhere(here: bool) -> bool:
    """Return whether something holds in every process."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(here)).all())


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """Return a position-dependent 32-bit sum of the bits of each array, uint32 [leaves]."""

    def of_leaf(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        for axis in range(x.ndim):
            odd = 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + 1
            bits = bits * (odd * jnp.uint32(2654435761))
        return bits.sum(dtype=jnp.uint32)

    return jnp.stack([of_leaf(leaf) for leaf in leaves])


def _describe(state: TrainState, sums: jax.Array | None = None) -> dict[str, list[Any]]:
    """Return path -> [dtype and shape, checksum where there are sums] of every array."""
    paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in jax.tree.leaves_with_path(state)]
    kinds = [[f"{x.dtype}{list(x.shape)}"] for x in jax.tree.leaves(state)]
    numbers = [[]] * len(kinds) if sums is None else [[int(x)] for x in np.asarray(sums)]
    return {path: kind + number for path, kind, number in zip(paths, kinds, numbers)}


def _check_arrays(name: str, wanted: Mapping[str, list[Any]], stored: Mapping[str, list[Any]]) -> None:
    """Raise UserError unless a checkpoint holds arrays of the names, dtypes and shapes that are wanted."""
    for path in [*wanted, *stored]:
        here, there = (arrays.get(path, ["missing"])[0] for arrays in (wanted, stored))
        if here != there:
            raise UserError(f"{name} holds another model: {path} is {there} there and {here} in this config")


def _digest(extras: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(extras, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Return one line; of the system's errors inside TensorStore's only what the system calls them."""
    # TensorStore puts the number last, after the message or after details whose order is not fixed.
    if code := re.search(r"os_error_code='?(\d+)", str(error)):
        return os.strerror(int(code[1]))
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]
