"""Several processes: they meet, compare what they are about to do, and notice when one of them is lost.

Process 0 listens at a port beside the coordinator's (`Place.meeting`), and every other process connects to it before
JAX starts. The connections stay open: who is silent for `SILENCE_SECONDS`, or whose connection ends without a farewell,
is lost, and the others end with status 1 in one line each. Threads do this, which go on while the main thread compiles
or waits for a collective.
"""

import atexit
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from research import storage
from research.errors import UserError
from research.runtime.coordinator import Service

JOIN_SECONDS = 300.0
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 30.0  # nothing holds Python's lock for so long
FAREWELL_SECONDS = 10.0  # in which the others of a process that failed may end by themselves, of the same error
SLURM_PORTS = 61440
MOST_BYTES = 64  # of a text that `agree` compares
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


class HostsError(Exception):
    """Raised when processes did not come together."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one process is among all."""

    coordinator: str  # host:port of JAX's coordination service, in process 0
    count: int
    index: int

    @property
    def meeting(self) -> tuple[str, int]:
        """Return the host and port at which the processes meet."""
        host, _, port = self.coordinator.rpartition(":")
        # Slurm's jobs take the ports from 61440 on, by their numbers: the next port is that of the next job.
        return host.strip("[]"), int(port) + 1 if int(port) < SLURM_PORTS else int(port) - 8192


# --- what is compared -----------------------------------------------------------------------------
def facts(config: Any) -> dict[str, str]:
    """Return what has to be the same in all processes, by name; the config may be None."""
    from research.reporting.record import git_revision

    found = {"code revision": json.dumps(git_revision())}
    found |= {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    return found | (_flat("config", config.to_dict()) if config is not None else {})


def _flat(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {key: text for part, x in value.items() for key, text in _flat(f"{name}.{part}", x).items()}
    return {name: repr(value)}


def difference(index: int, first: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Return the line that tells how the facts of a process differ from those of process 0; None if they do not."""
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    if not names:
        return None
    one, two = (side.get(names[0], "not set") for side in (first, other))
    more = f", and {len(names) - 1} more differences" if len(names) > 1 else ""
    return f"process {index} differs from process 0: {names[0]} is {two}, and {one} in process 0{more}"


def missing(joined: set[int], count: int) -> str:
    """Return the line that tells who did not come."""
    absent = sorted(set(range(count)) - joined)
    verb = "is" if len(absent) == 1 else "are"
    return f"{len(joined)} of {count} processes joined; {', '.join(map(str, absent))} {verb} missing"


# --- connections ----------------------------------------------------------------------------------
class Line:
    """One connection to another process: a JSON object a line, in both directions."""

    def __init__(self, connection: socket.socket, peer: str):
        self.peer = peer
        self._connection, self._lock = connection, threading.Lock()
        self._reader = connection.makefile("r", encoding="utf-8")
        self.wait_for(SILENCE_SECONDS)

    def wait_for(self, seconds: float) -> None:
        """Set for how long `receive` waits."""
        self._connection.settimeout(seconds)

    def send(self, **message: Any) -> None:
        """Send a message; a connection that is gone is noticed by who reads."""
        try:
            with self._lock:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
          TimeoutError: none came in time.
          OSError: the connection ended.
          ValueError: what came is no message.
        """
        text = self._reader.readline()
        if not text:
            raise ConnectionResetError
        return json.loads(text)


class _Watch:
    """Threads that keep the connections alive and end this process when another one is lost."""

    def __init__(self, lines: list[Line]):
        self.lines, self.status = lines, 1
        self.lost = threading.Event()
        self._ended: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._end, daemon=True).start()
        for line in lines:
            threading.Thread(target=self._read, args=(line,), daemon=True).start()

    def tell(self, **message: Any) -> None:
        for line in self.lines:
            line.send(**message)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.tell(beat=True)

    def _read(self, line: Line) -> None:
        try:
            while "beat" in (message := line.receive()):
                pass
        except TimeoutError:
            self._ended.put(f"{line.peer} is lost: it was silent for {SILENCE_SECONDS:.0f} s (stopped, or unreachable)")
        except (OSError, ValueError):
            self._ended.put(f"{line.peer} is lost: its connection ended (killed, or its machine is gone)")
        else:
            if "lost" in message:
                self._ended.put(message["lost"])
            elif message["farewell"] not in (0, 75):
                time.sleep(FAREWELL_SECONDS)
                self._ended.put(f"{line.peer} ended with status {message['farewell']}; its own lines say why")

    def _end(self) -> None:
        what = self._ended.get()
        self.lost.set()
        self.tell(lost=what)
        print(f"error: {what}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(1)


_watch: _Watch | None = None


# --- the start ------------------------------------------------------------------------------------
def place(timeout: float) -> Place:
    """Return what JAX finds out about this process: from its variables, Cloud TPU, Slurm, Open MPI or Kubernetes.

    Raises:
      UserError: nothing says who takes part.
    """
    from jax._src import clusters

    count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    address, number, own, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        int(count) if count else None,
        int(index) if index else None,
        None,
        None,
        int(timeout),
    )
    if address is None or number is None or own is None:
        names = "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise UserError(f"--distributed: nothing says who takes part; set {names}")
    return Place(address, number, own)


def join(config: Any, workdir: pathlib.Path | None, timeout: float = JOIN_SECONDS) -> None:
    """Meet the other processes, compare, and start JAX's own service.

    Args:
      config: compared; None if it is read from the workdir.
      workdir: a file that process 0 writes there has to be seen by all; None tests nothing.
      timeout: seconds to wait for the others.

    Raises:
      UserError: the processes differ, or do not share the workdir.
      HostsError: some process did not come.
    """
    global _watch
    import jax
    from jax._src import distributed

    here = place(timeout)
    if here.count > 1:
        own = facts(config)
        lines = _gather(here, own, workdir, timeout) if here.index == 0 else [_meet(here, own, timeout)]
        _watch = _Watch(lines)
        distributed._jax.get_distributed_runtime_service = Service
    jax.distributed.initialize(here.coordinator, here.count, here.index)
    atexit.register(_at_exit)  # after JAX's, hence called before it


def agree(own: Mapping[str, str]) -> None:
    """Compare what became known only after the processes had met; all must call it, with the same names.

    Args:
      own: name -> a text of at most `MOST_BYTES` bytes.

    Raises:
      UserError: in every process, where some differ.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1 or not own:
        return
    texts = np.array([value.encode() for value in own.values()], f"S{MOST_BYTES}").view(np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(texts)).view(f"S{MOST_BYTES}")
    first, *others = (dict(zip(own, map(bytes.decode, row))) for row in gathered)
    for index, other in enumerate(others, start=1):
        if text := difference(index, first, other):
            raise UserError(text)


def _gather(here: Place, own: dict[str, str], workdir: pathlib.Path | None, timeout: float) -> list[Line]:
    """Return the connections to all other processes, in process 0, once they agree."""
    deadline, lines, told = time.monotonic() + timeout, dict[int, Line](), dict[int, Any]()
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", here.meeting[1]), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=here.count
    ) as server:
        while len(lines) < here.count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line = Line(server.accept()[0], "")
                hello = line.receive()
                index, line.peer = int(hello["index"]), f"process {hello['index']} on {hello['host']}"
            except (OSError, ValueError, KeyError):
                continue  # nobody came, or it was somebody else
            lines[index], told[index] = line, hello["facts"]
    if len(lines) < here.count - 1:
        _refuse(lines, HostsError(f"{missing({0, *lines}, here.count)} after {timeout:.0f} s"))
    for index in sorted(lines):
        if text := difference(index, own, told[index]):
            _refuse(lines, UserError(text))
    if workdir is not None:
        _test_workdir(lines, workdir)
    for line in lines.values():
        line.send(go=True)
    return list(lines.values())


def _test_workdir(lines: dict[int, Line], workdir: pathlib.Path) -> None:
    """Raise UserError, here and in the others, unless all see what process 0 writes into the workdir."""
    probe = workdir / f".seen-by-all-{uuid.uuid4().hex}"
    storage.make_folder(workdir)
    storage.write(probe, probe.name.encode())
    try:
        for line in lines.values():
            line.send(probe=str(probe))
        for index in sorted(lines):
            if not lines[index].receive().get("seen"):
                text = f"--workdir: {lines[index].peer} does not see what process 0 writes to {workdir}"
                _refuse(lines, UserError(f"{text}; name a shared folder or a bucket"))
    finally:
        storage.remove(probe)


def _refuse(lines: dict[int, Line], error: Exception) -> NoReturn:
    for line in lines.values():
        line.send(error=str(error), mine=isinstance(error, UserError))
    raise error


def _meet(here: Place, own: dict[str, str], timeout: float) -> Line:
    """Return the connection to process 0, in any other process, once all agree."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            line = Line(socket.create_connection(here.meeting, timeout=5.0), f"process 0 on {here.meeting[0]}")
            break
        except OSError as error:
            if time.monotonic() > deadline:
                at = "{}:{}".format(*here.meeting)
                raise HostsError(f"process 0 is missing: nothing answers at {at} after {timeout:.0f} s") from error
            time.sleep(0.2)
    line.send(index=here.index, host=socket.gethostname(), facts=own)
    line.wait_for(timeout + SILENCE_SECONDS)
    while True:
        try:
            message = line.receive()
        except OSError as error:
            raise HostsError(f"{line.peer} went away before all processes had joined") from error
        if "probe" in message:
            line.send(seen=storage.path(message["probe"]).exists())
        elif "error" in message:
            raise (UserError if message["mine"] else HostsError)(message["error"])
        else:
            line.wait_for(SILENCE_SECONDS)
            return line


# --- the end --------------------------------------------------------------------------------------
@contextlib.contextmanager
def settling() -> Iterator[None]:
    """Hold an error back until it is clear whether its cause is that another process is lost.

    Then a thread tells that, in place of the error, and ends this process.
    """
    from research.runtime.preemption import PreemptedError  # imports JAX

    try:
        yield
    except Exception as error:
        if _watch is not None and not isinstance(error, PreemptedError):
            time.sleep(BEAT_SECONDS)
            if _watch.lost.is_set():
                time.sleep(SILENCE_SECONDS)
        raise


def leave(status: int) -> int:
    """Remember the status with which this process ends, and return it."""
    if _watch is not None:
        _watch.status = status
    return status


def _at_exit() -> None:
    """Say farewell; after a failure end at once, as JAX would wait for the others."""
    if _watch is None:
        return
    _watch.tell(farewell=_watch.status)
    if _watch.status not in (0, 75):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_watch.status)
