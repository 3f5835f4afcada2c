"""Preemption by SIGTERM: the run saves and exits with status 75."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class PreemptedError(Exception):
    """Raised when a preempted run stops; its progress is saved."""


class Preemption:
    """A context manager that detects SIGTERM.

    With several processes JAX's preemption service makes all stop at the same step; a single process uses a handler.
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
        """Raise PreemptedError if this process may stop on its own, such as during an evaluation."""
        if self._requested.is_set():
            raise PreemptedError

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._requested.set()
