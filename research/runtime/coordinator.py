"""JAX's coordination service in a process of its own: python -m research.runtime.coordinator BIND_ADDRESS COUNT TIMEOUT

JAX runs the service inside process 0, and aborts every other process with a native stack trace as soon as process 0 is
gone. Here the service outlives process 0 for some seconds, in which `hosts` ends the others in one line each.
"""

import os
import signal
import subprocess
import sys
import time
from typing import Any

LINGER_SECONDS = 5.0


class Service:
    """The service as JAX's `global_state` holds it: `shutdown()` ends it."""

    def __init__(self, address: str, count: int, heartbeat_timeout: int = 100, **_: Any):
        command = [sys.executable, "-m", __name__, address, str(count), str(heartbeat_timeout)]
        # A session of its own, so that a signal to the group of process 0 does not reach it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise OSError(f"the coordination service cannot listen on {address}; is the port in use?")

    def shutdown(self) -> None:
        """End the service, once all processes have left it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"done\n")
        except OSError:
            return
        self._process.wait()


def main(address: str, count: str, timeout: str) -> None:
    """Serve until the process that started this one says "done", or is gone."""
    from jax._src.lib import _jax

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    service = _jax.get_distributed_runtime_service(address, int(count), heartbeat_timeout=int(timeout))
    print("ready", flush=True)
    if sys.stdin.readline() != "done\n":
        time.sleep(LINGER_SECONDS)
        os._exit(1)
    service.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
