"""Joining and comparing, with threads in place of processes; the last test starts two."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from research.errors import UserError
from research.runtime import hosts

PROGRAM = """
import pathlib, sys, time
from research.runtime import hosts
hosts.join(None, None, 60)
print("joined", flush=True)
"""
BUSY = {
    "asleep": "with hosts.settling():\n    time.sleep(100)\n",
    "in collectives": """
import numpy as np
from jax.experimental import multihost_utils
with hosts.settling():
    while True:
        multihost_utils.process_allgather(np.ones(1000))
""",
}
AGREEING = """
import os
from research.errors import UserError
from research.runtime import hosts
hosts.join(None, None, 60)
try:
    hosts.agree({"seen by all": "same", "what config.data holds": os.environ["VALUE"]})
except UserError as error:
    print(error, flush=True)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def meet(workdir, configs: list[dict], absent: tuple[int, ...] = (), timeout: float = 20.0) -> list[Exception | None]:
    """Return what each process raises that is given its own config."""
    port, found = free_port(), [None] * len(configs)

    def run(index: int) -> None:
        here = hosts.Place(f"localhost:{port}", len(configs), index)
        try:
            if index == 0:
                hosts._gather(here, configs[0], workdir, timeout)
            else:
                hosts._meet(here, configs[index], timeout)
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(configs)) if i not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_that_agree_meet(tmp_path):
    assert meet(tmp_path / "run", [{"a": "1"}] * 3) == [None] * 3
    assert list((tmp_path / "run").iterdir()) == []


def test_all_are_told_who_differs_and_how():
    errors = meet(None, [{"config.rate": "0.1"}, {"config.rate": "0.1"}, {"config.rate": "0.2"}])
    line = "process 2 differs from process 0: config.rate is 0.2, and 0.1 in process 0"
    assert [(type(error), str(error)) for error in errors] == [(UserError, line)] * 3


def test_all_are_told_who_is_missing():
    errors = meet(None, [{}] * 4, absent=(2,), timeout=1.0)
    assert [str(errors[i]) for i in (0, 1, 3)] == ["3 of 4 processes joined; 2 is missing after 1 s"] * 3
    assert str(meet(None, [{}] * 2, absent=(0,), timeout=0.1)[1]).startswith("process 0 is missing")


def test_a_workdir_that_others_do_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts.storage, "path", lambda text: tmp_path / "another machine's")
    errors = meet(tmp_path / "run", [{}] * 2)
    assert all(re.search("process 1 on .* does not see what process 0 writes", str(error)) for error in errors)


def test_facts_name_values_by_their_path():
    from ml_collections import ConfigDict

    facts = hosts.facts(ConfigDict({"optimizer": {"rate": 0.1}, "steps": 3}))
    assert facts["config.optimizer.rate"] == "0.1"
    assert facts["config.steps"] == "3"
    assert {"code revision", "version of jax", "version of flax"} <= set(facts)


@contextlib.contextmanager
def started(program: str, values: tuple[str, ...] = ("", "", "")):
    """Starts processes of one program, each with its own value of VALUE, and ends them."""
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_NUM_PROCESSES": str(len(values))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=env | {"JAX_PROCESS_ID": str(i), "VALUE": value}, **pipes)
        for i, value in enumerate(values)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("busy", BUSY)
def test_a_lost_process_is_named_by_the_others_in_one_line(victim, number, busy):
    with started(PROGRAM + BUSY[busy]) as processes:
        for process in processes:
            assert process.stdout.readline() == "joined\n", process.stderr.read()
        time.sleep(2.0)  # in which collectives are compiled
        begin = time.monotonic()
        processes[victim].send_signal(number)
        for index in {0, 1, 2} - {victim}:
            _, said = processes[index].communicate(timeout=60)
            assert processes[index].returncode == 1
            assert re.fullmatch(rf"error: process {victim} on \S+ is lost: .*\n", said)
        assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_what_is_known_only_later_is_compared_too():
    with started(AGREEING, ("one", "one", "two")) as processes:
        line = "process 2 differs from process 0: what config.data holds is two, and one in process 0"
        assert [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes] == [line] * 3
