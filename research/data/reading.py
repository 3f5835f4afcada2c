"""Reads planned batches ahead of their use."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from research.data.batching import Batch
from research.errors import UserError

Arrays = dict[str, np.ndarray]
THREADS, AHEAD = 2, 4  # threads that read, and batches that are read before they are asked for


class Batches(Iterator[Arrays]):
    """The batches of a plan, in order, read by threads; its state is which one comes next."""

    def __init__(self, plan: Callable[[int], list[Batch] | None], read: Callable[[Batch], Arrays]):
        """Begin at the first batch.

        Args:
          plan: returns the batches of a window, which may have none, and None after the last window.
          read: reads a batch.
        """
        self._plan, self._read = plan, read
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._state = (0, 0)
        self._ahead: collections.deque[tuple[tuple[int, int], concurrent.futures.Future]] = collections.deque()
        self._planned = self._from(0, 0)

    def __next__(self) -> Arrays:
        """Return the next batch."""
        while len(self._ahead) < AHEAD and (planned := next(self._planned, None)) is not None:
            window, number, batch = planned
            if self._threads is None:
                self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "batches")
            self._ahead.append(((window, number), self._threads.submit(self._read, batch)))
        if not self._ahead:
            self.close()
            raise StopIteration
        place, future = self._ahead.popleft()
        self._state = (place[0], place[1] + 1)
        return future.result()

    def get_state(self) -> dict[str, int]:
        """Return where the next batch stands, as JSON."""
        return {"window": self._state[0], "batch": self._state[1]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where a state says.

        Raises:
          UserError: the state is of a version that planned nothing.
        """
        if set(state) != {"window", "batch"}:
            raise UserError(
                "--workdir: it holds a run of an earlier version, whose order of data is another; evaluate or export "
                "it, or start from it with config.init, in another folder"
            )
        self._state = (state["window"], state["batch"])
        self._ahead.clear()
        self._planned = self._from(*self._state)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def __del__(self) -> None:
        """Stop reading ahead."""
        self.close()

    def _from(self, window: int, batch: int) -> Iterator[tuple[int, int, Batch]]:
        """Yield the batches of the plan from one on, each with its window and its number there."""
        while (planned := self._plan(window)) is not None:
            for number in range(batch, len(planned)):
                yield window, number, planned[number]
            window, batch = window + 1, 0
