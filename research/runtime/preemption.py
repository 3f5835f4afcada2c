"""A machine that is about to be taken away says so with SIGTERM: save, and exit with status 75."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class PreemptedError(Exception):
    """The run was asked to stop; what it had done is saved."""


class Preemption:
    """Notices SIGTERM while it is entered.

    With several processes JAX's preemption service tells all of them the same step to stop at; alone, a handler does.
    """

    def __init__(self):
        self._requested = threading.Event()

    def __enter__(self) -> "Preemption":
        self._alone = jax.process_count() == 1
        self._handles = self._alone and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Return whether to stop before this step; the same in every process."""
        return self._requested.is_set() if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def check(self) -> None:
        """Raise PreemptedError where this process may stop alone; for the middle of an evaluation."""
        if self._requested.is_set():
            raise PreemptedError

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._requested.set()
