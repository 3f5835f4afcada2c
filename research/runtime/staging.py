"""Checkpoints in a place that Orbax cannot write to: written to a local folder, and copied from there."""

import concurrent.futures
import pathlib
import tempfile
import types
from collections.abc import Sequence
from typing import Any

import jax
from orbax.checkpoint import checkpoint_managers

from research import storage
from research.errors import UserError

MARKER = "complete"


class Staged:
    """The checkpoints of one process in a folder of a bucket; a folder of its own stands for it on the disk.

    A checkpoint is one if it holds a marker, which is written last and deleted first, so that what a killed process
    leaves is none. Copies are sent by a thread, one at a time.

    Attributes:
      local: where Orbax writes and reads.
    """

    def __init__(self, remote: Any):
        """Open a folder of checkpoints."""
        if jax.process_count() > 1:
            raise UserError(
                f"--workdir: {remote} takes checkpoints of one process; gs:// or a shared folder, of several"
            )
        self._remote = remote
        self._folder = tempfile.TemporaryDirectory()
        self.local = pathlib.Path(self._folder.name, "checkpoints")
        self.local.mkdir()
        self._sender = concurrent.futures.ThreadPoolExecutor(1)
        self._sending: concurrent.futures.Future | None = None

    def steps(self) -> list[int]:
        """Return the steps that are there, ascending."""
        return sorted(step for step, whole in self._found().items() if whole)

    def _found(self) -> dict[int, bool]:
        """Return step -> whether it is whole, or what a killed process has left of it."""
        parts = [name.split("/") for name in storage.find(self._remote)]
        whole = {part[0] for part in parts if part[1:] == [MARKER]}
        return {int(part[0]): part[0] in whole for part in parts if part[0].isdigit()}

    def fetch(self, step: int) -> None:
        """Copy a checkpoint to the disk, unless it is there."""
        target = self.local / str(step)
        if not target.exists():
            storage.download(self._remote / str(step), target)
            (target / MARKER).unlink(missing_ok=True)

    def push(self, step: int, kept: checkpoint_managers.PreservationPolicy) -> None:
        """Begin to send a checkpoint that is on the disk; those that are not kept are deleted when it is there."""

        def send() -> None:
            for left in [step for step, whole in self._found().items() if not whole]:
                self.delete(left)
            storage.put(self.local / str(step), self._remote / str(step))
            storage.write(self._remote / str(step) / MARKER, b"")
            for dropped in dropped_steps(kept, self.steps()):
                self.delete(dropped)

        self.wait()
        self._sending = self._sender.submit(send)

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        storage.remove(self._remote / str(step) / MARKER)
        storage.remove(self._remote / str(step))

    def check(self) -> None:
        """Raise what a copy that has ended raised."""
        if self._sending is not None and self._sending.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being sent; raise what the last copy raised."""
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def close(self) -> None:
        """Wait, and delete the folder on the disk."""
        try:
            self.wait()
        finally:
            self._sender.shutdown()
            self._folder.cleanup()


def dropped_steps(kept: checkpoint_managers.PreservationPolicy, steps: Sequence[int]) -> list[int]:
    """Return those of the steps, which are ascending, that a policy does not preserve."""
    preserved = kept.should_preserve([types.SimpleNamespace(step=step) for step in steps], context=None)  # type: ignore
    return [step for step, stays in zip(steps, preserved) if not stays]
