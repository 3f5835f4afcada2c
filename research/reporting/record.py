"""A run's folder, as a record that anyone can run again: config.json, run.json and result.json."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
from ml_collections import ConfigDict

from research import assets, storage
from research.configuration import trust
from research.configuration.moved import current_config
from research.data.mixture import with_new_weights
from research.errors import UserError
from research.runtime.preemption import PreemptedError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "tokenizers", "numpy")
# What may differ when a run is resumed: none of it changes what is computed.
FREE_TO_CHANGE = ("checkpoint", "log", "mesh", "plan")


class Record:
    """Write run.json when a run begins and when it ends, however it ends."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
        """Check that the folder holds no run of another config that has got as far as a checkpoint.

        Args:
          workdir: the run's folder; made if it is not there.
          config: resolved, as JSON.
        """
        self._path, self._config = workdir, config
        stored = read_config(workdir)
        saved = (workdir / "checkpoints").glob("[0-9]*")  # one that is being written has more to its name
        steps = [int(path.name) if path.name.isdigit() else 0 for path in saved]
        if stored is not None and steps:
            stored["data"] = with_new_weights(stored.get("data"), config.get("data"), max(steps))
            for key, old, new in differences(stored, config):
                if key.split(".")[0] not in FREE_TO_CHANGE:
                    raise UserError(
                        f"config.{key}: {workdir} holds a run with {old!r}, this one has {new!r}; use another --workdir"
                    )
        self._run = read_json(workdir / "run.json") or {}
        self._attempt: dict[str, Any] = {}

    def __enter__(self) -> "Record":
        if jax.process_index() == 0:
            storage.make_folder(self._path)
            write_json(self._path / "config.json", self._config)
            self._attempt = {"command": shlex.join(sys.orig_argv), "start": _now(), "end": None, "ended": "running"}
            self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if jax.process_index() == 0:
            stopped = "preempted" if isinstance(error, PreemptedError) else f"{kind.__name__}: {error}" if kind else ""
            self._attempt |= {"end": _now(), "ended": stopped or "finished"}
            with contextlib.suppress(*[Exception] if error else []):  # a full disk must not hide what stopped the run
                self._write()

    def note(self, **facts: Any) -> None:
        """Add facts about this attempt."""
        self._attempt |= facts

    def _write(self) -> None:
        attempts = [a for a in self._run.get("attempts", []) if a["start"] != self._attempt["start"]]
        for attempt in attempts:
            if attempt["ended"] == "running":
                attempt["ended"] = "killed"
        self._run = {
            "command": self._attempt["command"],
            "git": git_revision(),
            "python": sys.version.split()[0],
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "devices": {
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "hosts": jax.process_count(),
            },
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "seed": self._config.get("seed", 0),
            "assets": {uri: str(what) for uri, what in assets.resolved().items()},
            "start": attempts[0]["start"] if attempts else self._attempt["start"],
            "end": self._attempt["end"],
            "ended": self._attempt["ended"],
            "attempts": [*attempts, self._attempt],
        }
        write_json(self._path / "run.json", self._run)


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """Return the config of the run in a folder; see `read_config`."""
    config = read_config(workdir)
    if config is None:
        raise UserError(f"--workdir: {workdir} holds no run (it has no config.json)")
    return ConfigDict(config)


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Return the config of the run in a folder as JSON, with today's dotted paths; None where there is no run.

    Raises:
      UserError: it names what a folder may not name; see `research.configuration.trust`.
    """
    config = current_config(read_json(workdir / "config.json"))
    trust.check(config, workdir / "config.json")
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) wherever two configs differ; None where a key is missing."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def read_json(path: pathlib.Path) -> Any:
    """Return what a JSON file holds; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); move it away to go on") from None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file atomically."""
    storage.write(path, (json.dumps(value, indent=2) + "\n").encode())


def peak_memory_bytes() -> int:
    """Return the most memory used so far: by the first device where it says, else by this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def git_revision() -> dict[str, Any] | None:
    """Return the commit that this code is at and whether it was changed since; None outside a repository."""
    folder = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
