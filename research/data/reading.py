"""Reads planned batches ahead of their use, by threads or, where ops are heavy, by processes of their own."""

import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
from grain.multiprocessing import SharedMemoryArray, SharedMemoryArrayMetadata

from research.data.batching import Batch
from research.errors import UserError

Arrays = dict[str, np.ndarray]
Read = Callable[[Batch, Batch | None], Arrays]
THREADS, AHEAD = 2, 4  # threads that read, and batches that are read before they are asked for, beside one a process
SHARED = 2**16  # bytes from which an array is handed over in shared memory
MEMORY = "/dev/shm"


class Batches(Iterator[Arrays]):
    """The batches of a plan, in order; its state is which one comes next, whoever reads them."""

    def __init__(
        self,
        plan: Callable[[int], list[Batch] | None],
        share: Callable[[Batch], tuple[Batch, Batch | None]],
        read: Read,
        pool: "Pool | None" = None,
    ):
        """Begin at the first batch.

        Args:
          plan: returns the batches of a window, which may have none, and None after the last window.
          share: returns what `read` takes of a batch.
          read: reads a batch.
          pool: processes that do so; threads of this one where it is None.
        """
        self._plan, self._share, self._read = plan, share, pool.read if pool else read
        self._planner: concurrent.futures.ThreadPoolExecutor | None = None
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._count = pool.count + 1 if pool else THREADS  # of threads; those that wait for a process cost nothing
        self._most = AHEAD + (self._count - THREADS)
        self._state = (0, 0)
        self._ahead: collections.deque[tuple[tuple[int, int], concurrent.futures.Future]] = collections.deque()
        self._planned = self._from(0, 0)

    def __next__(self) -> Arrays:
        """Return the next batch."""
        while len(self._ahead) < self._most and (planned := next(self._planned, None)) is not None:
            window, number, batch = planned
            self._ahead.append(((window, number), self._submit(*self._share(batch))))
        if not self._ahead:
            self.close()
            raise StopIteration
        place, future = self._ahead.popleft()
        self._state = (place[0], place[1] + 1)
        return future.result()

    def get_state(self) -> dict[str, Any]:
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
        self._ahead.clear()
        for threads in (self._threads, self._planner):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)
        self._threads = self._planner = None

    def __del__(self) -> None:
        """Stop reading ahead."""
        self.close()

    def _from(self, window: int, batch: int) -> Iterator[tuple[int, int, Batch]]:
        """Yield the batches of the plan from one on, each with its window and its number there."""
        if self._planner is None:
            self._planner = concurrent.futures.ThreadPoolExecutor(1, "plan")
        planned = self._planner.submit(self._plan, window)
        while (batches := planned.result()) is not None:
            planned = self._planner.submit(self._plan, window + 1)  # while this one is read
            for number in range(batch, len(batches)):
                yield window, number, batches[number]
            window, batch = window + 1, 0

    def _submit(self, own: Batch, first: Batch | None) -> concurrent.futures.Future:
        if self._threads is None:
            self._threads = concurrent.futures.ThreadPoolExecutor(self._count, "batches")
        return self._threads.submit(self._read, own, first)


class Pool:
    """Processes that read batches; they end with the one that started them."""

    def __init__(self, read: Read, count: int):
        """Start `count` processes, which get a copy of what `read` needs."""
        self.count = count
        self._executor = concurrent.futures.ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), _begin, (cloudpickle.dumps(read),)
        )

    def read(self, own: Batch, first: Batch | None) -> Arrays:
        """Have a batch read and wait for it.

        Raises:
          OSError: a process is gone.
        """
        try:
            sent = self._executor.submit(_sent, own, first).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise OSError(
                "a process that reads data was killed, perhaps for lack of memory; the same command resumes, and "
                "config.data.workers sets how many there are"
            ) from error
        return {name: _received(value) for name, value in sent.items()}

    def close(self) -> None:
        """End the processes."""
        self._executor.shutdown(wait=True, cancel_futures=True)


_read: Read  # of a process that reads


def _begin(read: bytes) -> None:
    """Begin a process that reads: signals are for the one that started it, which saves; it ends when that is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"  # ops need no accelerator, which the other one holds
    global _read
    _read = cloudpickle.loads(read)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _sent(own: Batch, first: Batch | None) -> dict[str, Any]:
    """Return the arrays of a batch, or where they are in shared memory."""
    arrays = _read(own, first)
    total = sum(array.nbytes for array in arrays.values())
    # Containers often have little of it, and a process that writes beyond it is killed.
    room = os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 4 * total
    return {name: _shared(array) if room and array.nbytes > SHARED else array for name, array in arrays.items()}


def _shared(array: np.ndarray) -> SharedMemoryArrayMetadata:
    shared = SharedMemoryArray(array.shape, array.dtype)
    np.copyto(shared, array)
    return shared.metadata


def _received(value: np.ndarray | SharedMemoryArrayMetadata) -> np.ndarray:
    """Return an array, copied from shared memory, which is freed."""
    if isinstance(value, np.ndarray):
        return value
    shared = SharedMemoryArray.from_metadata(value)
    array = np.array(shared, subok=False)
    del shared
    value.close_and_unlink_shm()
    return array
