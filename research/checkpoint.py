"""Checkpoints by Orbax: asynchronous, atomic, verified when they are read.

A checkpoint holds the train state, the position in the data and a checksum of every array. The checksums are computed
on the devices that hold the arrays, before saving and after restoring, so that a damaged file is never trusted.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from research.errors import UserError, nearest
from research.step import TrainState


class UnreadableCheckpointError(Exception):
    """A run has checkpoints and none of them can be read."""


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      best: the evaluation metric by which the best checkpoint is kept, "test/accuracy"; None keeps only the latest.
      mode: "max" or "min".
      every_steps: steps between saves; 0 saves at the end only.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        every_steps: int = 0,
        keep: int = 2,
        best: str | None = None,
        mode: str = "max",
        patience: int | None = None,
        read_only: bool = False,
    ):
        """Opens a folder of checkpoints.

        Args:
          directory: the folder; made on the first save.
          every_steps: as above.
          keep: how many of the latest are kept; at least 2, so that a damaged one has a forerunner.
          best: as above.
          mode: as above.
          patience: stop early after that many evaluations without a better `best`; None never does.
          read_only: never write or delete.
        """
        if mode not in ("max", "min"):
            raise UserError(f"config.checkpoint.mode: '{mode}' is neither 'max' nor 'min'")
        if keep < 1 or every_steps < 0:
            raise UserError(
                f"config.checkpoint: keep ({keep}) must be at least 1, every_steps ({every_steps}) at least 0"
            )
        if patience is not None and best is None:
            raise UserError("config.checkpoint.patience: early stopping needs config.checkpoint.best, a metric's name")
        self.best, self.mode, self.every_steps, self.patience = best, mode, every_steps, patience
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
                best_fn=(lambda metrics: metrics[best]) if best else None,  # makes Orbax keep the metrics
                best_mode=mode,
            ),
            item_names=("state", "extras"),
        )

    def save(self, step: int, state: TrainState, extras: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Begins to save; returns once the arrays are copied. `extras` is JSON; a step that exists is left alone."""
        if step in self._manager.all_steps():
            return
        ranked = dict(metrics) if self.best and np.isfinite(metrics.get(self.best, np.nan)) else None
        extras = dict(extras) | {"checksums": _checksums(state)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                extras=ocp.args.JsonSave(extras | {"digest": _digest(extras)}),
            ),
            metrics=ranked,
            force=True,
        )

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the latest readable checkpoint, as (state, extras), or None where there is none at all.

        Args:
          target: ShapeDtypeStructs with shardings: the mesh may be another than the one that saved.

        Raises:
          UnreadableCheckpointError: there are checkpoints, and none is readable.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self.read(step, target)
            except Exception as error:
                logging.warning("checkpoint %d is unreadable (%s); trying the one before", step, _first_line(error))
                continue
            self._set_aside([s for s in steps if s > step])
            return restored
        if steps:
            raise UnreadableCheckpointError(f"none of the checkpoints {steps} in {self._directory} can be read")
        return None

    def read(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads and verifies one checkpoint."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), extras=ocp.args.JsonRestore())
        )
        state, extras = restored["state"], restored["extras"]
        if extras.pop("digest", None) != _digest(extras) or extras.pop("checksums") != _checksums(state):
            raise ValueError("its checksums are not those that were saved")
        return state, extras

    def steps(self) -> list[int]:
        """Returns the steps that were saved, ascending."""
        return sorted(self._manager.all_steps())

    def ranking(self, metrics: Mapping[str, float]) -> float:
        """Returns the value that checkpoints are ranked by."""
        if self.best is None or self.best not in metrics:
            raise UserError(
                f"config.checkpoint.best: no evaluation gives '{self.best}'{nearest(str(self.best), metrics)}"
            )
        return metrics[self.best]

    def better(self, value: float, other: float) -> bool:
        """Returns whether a value ranks above another."""
        return value > other if self.mode == "max" else value < other

    def best_step(self) -> int | None:
        """Returns the step with the best metric so far, or None."""
        return self._manager.best_step() if self.best else None

    def wait(self) -> None:
        """Returns when every save has ended; raises what went wrong in one."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()

    def _set_aside(self, steps: list[int]) -> None:
        """Renames unreadable checkpoints, so that their steps can be saved again and nothing is lost."""
        if jax.process_index() == 0:
            for step in steps:
                (self._directory / str(step)).rename(self._unused_name(step))
        self._manager.reload()

    def _unused_name(self, step: int) -> pathlib.Path:
        names = (self._directory / f"unreadable-{step}-{i}" for i in range(1000))
        return next(name for name in names if not name.exists())


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """Returns a position-dependent 32-bit sum of the bits of each array, uint32 [leaves]."""

    def of_leaf(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        for axis in range(x.ndim):
            odd = 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + 1
            bits = bits * (odd * jnp.uint32(2654435761))
        return bits.sum(dtype=jnp.uint32)

    return jnp.stack([of_leaf(leaf) for leaf in leaves])


def _checksums(state: TrainState) -> list[int]:
    return [int(x) for x in np.asarray(_sums(jax.tree.leaves(state)))]


def _digest(extras: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(extras, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
