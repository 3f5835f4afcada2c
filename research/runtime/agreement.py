"""Before processes begin to work together: do they have the same config, code and libraries, and one folder?"""

import importlib.metadata
import json
import pathlib
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from research import storage
from research.errors import UserError
from research.reporting.record import differences, git_revision

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
PROBE = ".seen-by-all-processes"  # a file of the run's folder, while it is checked
SHOWN = 3  # differences that are named
PATIENCE = 30.0  # seconds until a file is seen in a folder that machines share


def check(config: ConfigDict, workdir: pathlib.Path | None) -> None:
    """Return where all processes agree with the first; call it in all of them.

    Args:
      config: what is to be run.
      workdir: the folder that all must see, which the first writes to; None leaves it out.

    Raises:
      UserError: this process differs, or another one does.
    """
    mine = facts(config)
    wrong = [f"{key} is {own!r} here and {first!r} there" for key, first, own in differences(_from_first(mine), mine)]
    _stop_where("; ".join(wrong[:SHOWN]) + ("; ..." if len(wrong) > SHOWN else ""))
    if workdir is not None:  # all get here or none, so that none waits for another
        unseen = f"it does not see what process 0 writes to {workdir}; --workdir must be one folder for all"
        _stop_where("" if _sees(workdir) else unseen)


def _stop_where(wrong: str) -> None:
    """Raise UserError in all processes where something is wrong in one."""
    others = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(wrong))))
    if wrong:
        raise UserError(f"process {jax.process_index()} differs from process 0: {wrong}")
    if len(others):
        raise UserError(f"process {', '.join(map(str, others))} differs from process 0, and says in what")


def facts(config: ConfigDict) -> dict[str, Any]:
    """Return what must be the same in all processes, as JSON has it."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions["Python"] = ".".join(map(str, sys.version_info[:2]))
    return json.loads(
        json.dumps({"config": json.loads(config.to_json()), "code": git_revision(), "versions": versions})
    )


def _from_first(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of process 0."""
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(encoded))))
    padded = np.resize(encoded, size)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


def _sees(workdir: pathlib.Path) -> bool:
    """Return whether a file that process 0 writes is in this process' folder, too."""
    token = _from_first({"token": uuid.uuid4().hex})["token"]
    path = workdir / PROBE
    if jax.process_index() == 0:
        storage.make_folder(workdir)
        storage.write(path, token.encode())
    multihost_utils.sync_global_devices("the folder is written to")
    deadline = time.monotonic() + PATIENCE
    while not (seen := _holds(path, token)) and time.monotonic() < deadline:
        time.sleep(0.5)
    multihost_utils.sync_global_devices("the folder is looked at")
    if jax.process_index() == 0:
        storage.remove(path)
    return seen


def _holds(path: pathlib.Path, token: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == token
    except OSError:
        return False
