"""Makes the shards of prepared rows, in as many processes as there are, on one machine or on several.

Whoever works on a shard holds its lease, a file that is written again every second. A lease that is older than EXPIRED
seconds, or whose process on this machine is gone, is taken over, so that a process that is killed loses one shard. Two
that take over at once make the same shard twice, and the first one counts.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import queue
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

import cloudpickle
import jax

from research.data import columns, shards
from research.errors import UserError

Example = dict[str, Any]
EXPIRED, BEAT, POLL, TELL = 60.0, 1.0, 0.2, 10.0  # seconds
COPIES = 2**33  # bytes of memory that copies of a source may take


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be prepared.

    Attributes:
      folder: of the shards.
      source: examples by position.
      make: returns the rows of an example.
      count: the number of shards.
      size: of the source, in bytes, as estimated; for the rate that is told.
    """

    folder: pathlib.Path
    source: Any
    make: Callable[[Example], list[Example]]
    count: int
    size: float

    def path(self, shard: int) -> pathlib.Path:
        """Return the folder of a shard."""
        return self.folder / f"{shard:05d}-of-{self.count:05d}"

    def examples(self, shard: int) -> range:
        """Return the positions of a shard's examples."""
        return range(len(self.source) * shard // self.count, len(self.source) * (shard + 1) // self.count)

    def missing(self) -> list[int]:
        """Return the shards that are not there."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return [shard for shard in range(self.count) if self.path(shard).name not in there]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(job: Job, workers: int, name: str) -> None:
    """Make the shards that are missing, by this process and `workers` - 1 others.

    Raises:
      UserError: an example is wrong, or the folder cannot be written to.
    """
    if not (missing := job.missing()):
        return
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise shards.unwritable(job.folder, error) from error
    context = multiprocessing.get_context("spawn")  # a fork would share the threads and locks of JAX
    errors = context.Queue()
    others: list[Any] = []
    with contextlib.ExitStack() as stack:
        if extra := min(workers, len(missing)) - 1:
            payload = cloudpickle.dumps(job)
            extra = min(extra, COPIES // len(payload))  # each gets a copy of a source that is in memory
            others = [context.Process(target=_help, args=(payload, errors), daemon=True) for _ in range(extra)]
            for other in others:
                other.start()
                stack.callback(_end, other)
        progress = _Progress(job, name, len(missing))
        _work(job, lambda: _check(errors, progress))
        progress.finish()
    _clear(job)


def _end(process: Any) -> None:
    process.terminate()
    process.join()


def _help(payload: bytes, errors: Any) -> None:
    """Work beside the process that started this one, and end with it."""
    parent = multiprocessing.parent_process()
    os.environ["JAX_PLATFORMS"] = "cpu"  # ops need no accelerator, which the parent holds
    try:
        _work(cloudpickle.loads(payload), lambda: None if parent is None or parent.is_alive() else sys.exit(1))
    except UserError as error:
        errors.put(str(error))


def _check(errors: Any, progress: "_Progress") -> None:
    """Raise what another process found, and tell how far all are."""
    with contextlib.suppress(queue.Empty):
        raise UserError(errors.get_nowait())
    progress.tell()


def _work(job: Job, check: Callable[[], None]) -> None:
    """Make one shard after another until none is missing; `check` is called often and may raise."""
    start = os.getpid() % job.count  # others begin elsewhere
    while missing := job.missing():
        check()
        order = sorted(missing, key=lambda shard: (shard - start) % job.count)
        taken = next((lease for shard in order if (lease := _take(job, shard))), None)
        if taken is None:
            time.sleep(POLL)
            continue
        with taken:
            _make(job, taken, check)


def _make(job: Job, lease: "_Lease", check: Callable[[], None]) -> None:
    if job.path(lease.shard).exists():  # since the last look
        return
    rows, wanted = [], job.examples(lease.shard)
    for done, index in enumerate(wanted):
        if lease.beat(done / len(wanted)):
            check()
        rows += job.make(job.source[index])
    lease.beat(1.0, now=True)
    shards.write(columns.of_rows(rows), job.path(lease.shard))


class _Lease:
    """The right to make a shard."""

    def __init__(self, job: Job, shard: int):
        self.shard, self._path, self._token = shard, _lease_path(job, shard), uuid.uuid4().hex
        self._beaten = 0.0

    def take(self) -> bool:
        """Return whether nobody else holds it."""
        with contextlib.suppress(FileExistsError):
            with open(self._path, "x", encoding="utf-8") as file:
                file.write(self._text(0.0))
            self._beaten = time.monotonic()
            return True
        return False

    def beat(self, done: float, now: bool = False) -> bool:
        """Say that this process is alive, and which share is done, every second; return whether it did."""
        if not now and time.monotonic() - self._beaten < BEAT:
            return False
        temporary = self._path.with_name(f".{self._token}.lease")
        try:
            temporary.write_text(self._text(done), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            raise shards.unwritable(self._path.parent, error) from error
        self._beaten = time.monotonic()
        return True

    def _text(self, done: float) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": self._token, "done": done})

    def __enter__(self) -> "_Lease":
        return self

    def __exit__(self, *_: object) -> None:
        if _read_lease(self._path).get("token") == self._token:
            self._path.unlink(missing_ok=True)


def _lease_path(job: Job, shard: int) -> pathlib.Path:
    return job.folder / f"{job.path(shard).name}.lease"


def _take(job: Job, shard: int) -> _Lease | None:
    """Take a shard's lease, if nobody who is alive holds it."""
    lease, path = _Lease(job, shard), _lease_path(job, shard)
    try:
        if not lease.take() and _dead(path):
            path.unlink(missing_ok=True)
            return lease if lease.take() else None
        return lease if lease._beaten else None
    except OSError as error:
        raise shards.unwritable(job.folder, error) from error


def _read_lease(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # gone, or being written
        return {}


def _dead(path: pathlib.Path) -> bool:
    """Return whether the process that holds a lease is gone, as far as can be told."""
    holder = _read_lease(path)
    if holder.get("host") == socket.gethostname():
        if holder["pid"] == os.getpid():  # one that had this number before
            return True
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    probe = path.with_name(f".{uuid.uuid4().hex}.clock")  # the folder's clock, which may not be this machine's
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > EXPIRED
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


class _Progress:
    """Lines that say how much is done by all processes, and how fast."""

    def __init__(self, job: Job, name: str, missing: int):
        self._job, self._name, self._begin = job, name, time.monotonic()
        self._first = job.count - missing
        self._told = self._begin
        self._line(f"preparing {name} in {job.folder}: {len(job.source)} examples, {job.size / 1e6:.0f} MB ...")

    def tell(self) -> None:
        """Print a line if the last one is old."""
        if time.monotonic() - self._told < TELL:
            return
        done = self._job.count - len(self._job.missing())
        done += sum(_read_lease(path).get("done", 0.0) for path in self._job.folder.glob("[0-9]*.lease"))
        share, rate = done / self._job.count, (done - self._first) / self._job.count / self._seconds
        left = (1 - share) / rate if rate else float("inf")
        self._line(f"preparing {self._name}: {share:.0%}, {self._rate(done)}, {left:.0f} s left")
        self._told = time.monotonic()

    def finish(self) -> None:
        """Print the last line."""
        self._line(f"prepared {self._name}: {self._seconds:.1f} s, {self._rate(self._job.count)}")

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-6)

    def _rate(self, done: float) -> str:
        return f"{(done - self._first) / self._job.count * self._job.size / 1e6 / self._seconds:.2f} MB/s"

    def _line(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, file=sys.stderr, flush=True)


def drop_damaged(job: Job) -> int:
    """Delete the shards of which a file is not what was written, and return how many there were."""
    dropped = 0
    for path in map(job.path, set(range(job.count)) - set(job.missing())):
        try:
            shards.read(path, whole=True)
        except shards.DamagedError:
            shutil.rmtree(path)
            dropped += 1
    return dropped


def _clear(job: Job) -> None:
    """Delete what killed processes have left."""
    with contextlib.suppress(OSError):
        for path in job.folder.iterdir():
            if (path.name.startswith(".") or path.suffix == ".lease") and time.time() - path.stat().st_mtime > EXPIRED:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
