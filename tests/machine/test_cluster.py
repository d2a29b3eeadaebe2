"""Tests of several processes that run in one; tests/cli/test_pod.py starts real ones."""

import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import small_run

from dit_jax import compat
from dit_jax.errors import UserError
from dit_jax.machine import cluster


@pytest.fixture
def connections(monkeypatch):
    """The arguments of every call of jax.distributed.initialize, which does nothing here."""
    calls = []
    monkeypatch.setattr(cluster.jax.distributed, "initialize", lambda *args: calls.append(args))
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    "variables, count",
    [
        ({}, 0),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8"}, 0),  # in a shell of salloc, not under srun
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 0),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, 1),
    ],
)
def test_only_slurm_steps_with_several_tasks_connect(connections, monkeypatch, variables, count):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cluster.connect()
    assert connections == [()] * count


@pytest.mark.parametrize(
    "platforms, expected",
    [(None, True), ("", True), ("tpu", True), ("tpu,cpu", True), ("cpu", False), ("cuda", False)],
)
def test_a_tpu_pod_is_detected_by_its_chips(connections, monkeypatch, platforms, expected):
    monkeypatch.setattr(cluster.peers.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)  # of libtpu
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    cluster.connect()
    assert connections == [()] * expected


@pytest.mark.parametrize(
    "address, message",
    [
        ("here", "coordinator must be host:port, got 'here'"),
        ("here:x", "coordinator must be host:port, got 'here:x'"),
        (":1234", "coordinator must be host:port, got ':1234'"),
        ("localhost:99999", "coordinator must be host:port, got 'localhost:99999'"),
        ("localhost:1", "must be reachable from all processes, got localhost:1: .*refused"),
    ],
)
def test_an_unreachable_coordinator_is_a_user_error(connections, monkeypatch, address, message):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0)
    with pytest.raises(UserError, match=message):
        cluster.connect(coordinator=address, num_processes=2, process_id=1)
    assert connections == []


def test_process_0_checks_the_address_too(connections):
    with pytest.raises(UserError, match="coordinator must be host:port, got 'here'"):
        cluster.connect(coordinator="here", num_processes=2, process_id=0)


def test_sigterm_stops_a_process_that_waits_for_others():
    command = [sys.executable, "-m", "dit_jax.cli.train", "--config=configs/digits.py"]
    command += ["--workdir=/tmp/none", *processes.flags(processes.free_address(), 2, 0)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    small_run.read_until(process, "waiting for 2 processes at localhost:")
    time.sleep(1)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 42
    ours = [line for line in errors.splitlines() if not small_run.NOISE.search(line)]
    assert ours[0].startswith("dit-train: interrupted with nothing new to save")


def pretend(monkeypatch, others):
    """Every gather returns these numbers for the other processes."""
    monkeypatch.setattr(cluster, "_gather", lambda number: [number, *others])


def test_together_raises_the_error_of_the_only_process():
    with cluster.together():
        pass
    with pytest.raises(KeyError, match="own"), cluster.together():
        raise KeyError("own")


@pytest.mark.parametrize(
    "error, others, raised, message",
    [
        (None, [0, 0], None, ""),
        (None, [0, 1], UserError, "another process failed"),
        (None, [2, 0], KeyError, "another process failed"),
        (KeyError("own"), [0, 0], KeyError, "own"),
        (KeyError("own"), [2, 0], KeyError, "own"),
        (KeyError("own"), [1, 2], UserError, "another process failed"),
        (OSError("own"), [2, 0], OSError, "own"),
    ],
)
def test_together_raises_the_same_class_on_all_processes(
    monkeypatch, error, others, raised, message
):
    pretend(monkeypatch, others)

    def work():
        with cluster.together(KeyError):
            if error:
                raise error

    if raised:
        with pytest.raises(raised, match=message):
            work()
    else:
        work()


class Client:
    """The key-value store of all processes, with the methods of jax's client."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [item for item in self.values.items() if item[0].startswith(f"{folder}/")]


@pytest.fixture
def task(monkeypatch):
    """A task of process 0 of two, and the client that both share."""
    client = Client()
    monkeypatch.setattr(compat, "distributed_client", lambda: client)
    monkeypatch.setattr(cluster.jax, "process_count", lambda: 2)
    return cluster.Task(), client


def test_task_waits_for_the_other_processes(task):
    process_0, client = task
    client.values[f"{process_0._name}/0/1"] = ""
    process_0.wait(key="of Orbax", timeout_ms=10_000)
    with pytest.raises(OSError, match="a process did not finish writing in 0 s"):
        process_0.wait(key="of Orbax", timeout_ms=1)  # the other process does not make this call


def test_task_stops_waiting_when_another_process_failed(task):
    process_0, client = task
    client.values[f"{process_0._name}/failed/1"] = ""
    started = time.monotonic()
    with pytest.raises(OSError, match="process 1 could not write and logs the reason"):
        process_0.wait(key="of Orbax", timeout_ms=60_000)
    assert time.monotonic() - started < 5
    process_0.fail()
    assert f"{process_0._name}/failed/0" in client.values
